// Fills a buffer of 4-byte elements. Selection kernels use it to start `indices` at -1, the mark of an empty
// slot.
#include "fill.h"

#include <algorithm>

#include "device.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 2048;  // enough to fill any GPU

// out [count]
__global__ void fill_words_kernel(uint32_t* __restrict__ out, int64_t count, uint32_t word) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i < count; i += step) out[i] = word;
}

}  // namespace

const char* fill_words(void* out, int64_t count, uint32_t word, int32_t device, void* stream) {
    if (count <= 0) return nullptr;  // a grid of zero blocks is an error
    const unsigned blocks = static_cast<unsigned>(std::min(divide_up(count, kThreads), kMostBlocks));
    return launch(fill_words_kernel, blocks, kThreads, 0, device, stream, static_cast<uint32_t*>(out), count,
                  word);
}

}  // namespace sparse_attn::cuda
