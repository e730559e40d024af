// Between csrc/cuda_host.cpp and csrc/cuda/fill.cu: no torch and no CUDA header.
#pragma once

#include <cstdint>

namespace sparse_attn::cuda {

// Writes `word` to each of the `count` 4-byte elements at `out` (contiguous, on GPU `device`), in order on
// `stream`. Returns nullptr, or CUDA's own message.
const char* fill_words(void* out, int64_t count, uint32_t word, int32_t device, void* stream);

}  // namespace sparse_attn::cuda
