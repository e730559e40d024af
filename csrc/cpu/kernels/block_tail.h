// Between cpu/block_tail.cpp and the kernels of block_tail. No torch headers.
#pragma once

#include "cpu/kernels/masked_attention.h"

namespace sparse_attn {

// Attention to the means of whole blocks of keys: what select and attend call keys are blocks, but the rule
// and the indices speak of the keys themselves.
struct BlockTailParams {
    SelectParams select;        // query, key
    AttendParams attend;        // likewise, and the chosen keys
    const uint32_t* bits;       // [B, Hq, Tq, bit_words(keys)]: the selection in place of indices, or null
    int64_t keys, block;        // how many there are, and of a block: a power of two from 32 on
    const void* packed_key;     // as topk_select packs them
    const float* packed_value;  // as masked_attention packs them
    const uint8_t* special;     // [B, Hkv, M], likewise
};

namespace cpu {

struct BlockTailKernels {
    int64_t (*block_queries)(const BlockTailParams&);  // of one task
    Kernel<BlockTailParams, MaskedTask> attend;
    // Of the backward, for some queries of all heads: counts and seen.
    int64_t (*gradient_scratch_bytes)(const BlockTailParams&);
    void (*prepare)(const BlockTailParams&, const MaskedBackwardParams&, int64_t b, Range queries,
                    void* scratch);
};

}  // namespace cpu

}  // namespace sparse_attn
