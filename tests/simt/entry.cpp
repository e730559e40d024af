// The host functions of csrc/cuda under C names, for ctypes: a device and a stream mean nothing here.
#include "cuda/fill.h"

extern "C" {

const char* run_fill(void* out, int64_t count, int32_t word) {
    return sparse_attn::cuda::fill_words(out, count, static_cast<uint32_t>(word), 0, nullptr);
}
}
