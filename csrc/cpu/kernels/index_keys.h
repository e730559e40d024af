// Between cpu/index_keys.cpp and its kernel: keys to the 8-bit rows of a key index. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

struct IndexKeysParams {
    const void* key;  // [B, Hkv, T, D]
    Strides key_strides;
    DType dtype;
    int64_t kv_heads, length, head_dim;
    int64_t begin;       // the first key's place in the index
    int64_t blocks;      // N
    int8_t* codes;       // [B, Hkv, N, ⌈D/4⌉, 16, 4]: k̂ / scale
    float* bounds;       // [B, Hkv, N, 3, 16]: scale, ≥ ‖k − μ − k̂‖, ≥ ‖k − μ‖
    const float* shift;  // [B, Hkv, D]: μ
};

namespace cpu {

// Blocks [first, last) of one key head: those of its keys that are new.
struct IndexKeysTask {
    int64_t b, kv_head, first, last;
};

using IndexKeysKernel = Kernel<IndexKeysParams, IndexKeysTask>;

}  // namespace cpu

}  // namespace sparse_attn
