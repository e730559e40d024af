// Fills a buffer of 4-byte elements. Selection kernels use it to start `indices` at -1, the mark of an empty
// slot.
#include <cuda_runtime.h>

#include <algorithm>

#include "fill.h"

namespace sparse_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 8;  // 8 × 256 threads fill an SM of every supported GPU, or nearly

// out [count]
__global__ void fill_words_kernel(uint32_t* __restrict__ out, int64_t count, uint32_t word) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i < count; i += step) out[i] = word;
}

}  // namespace

const char* fill_words(void* out, int64_t count, uint32_t word, int32_t device, void* stream) {
    if (count <= 0) return nullptr;  // a grid of zero blocks is an error
    // This file has a CUDA runtime of its own (linked statically): it must be told the device too.
    cudaError_t error = cudaSetDevice(device);
    int multiprocessors = 0;
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
        const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads,
                                                 static_cast<int64_t>(multiprocessors) * kBlocksPerSM);
        fill_words_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<uint32_t*>(out), count, word);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sparse_attn::cuda
