// What the hosts hand to the attention kernels of any device: plain pointers, sizes and strides. No torch
// headers here or in any kernel; what one op alone needs stands beside its kernels.
//
// Letters: B batch, Hq query heads, Hkv key/value heads, G selections per batch entry (Hq, Hkv or 1), Tq
// queries, Tk keys, D head dimension, Dv value dimension, K slots per query. Strides count elements and may
// be anything.
#pragma once

#include "common/rule.h"

namespace sparse_attn {

// Bits of a number, its sign among them, that bounds are made of: whole numbers of 8 or 16, or bfloat16.
constexpr int kByteBits = 8, kTileBits = 9, kPairBits = 16;

struct SelectParams {
    const void* query;  // [B, Hq, Tq, D]
    const void* key;    // [B, Hkv, Tk, D]
    int32_t* indices;   // [B, G, Tq, K], contiguous: the result
    Strides query_strides, key_strides;
    Rule rule;
    int64_t batch, heads, kv_heads, query_length, key_length, head_dim;
    int64_t top_k;    // K = min(top_k, Tk) of the call
    int bounds_bits;  // of the rows that bounds are made of, where it is done by bounds
    bool rounded;     // scores of queries and keys rounded to 8 bits, each with its own scale
    DType dtype;
    // If not null, only the keys of a tile's blocks are candidates: int32 [B, G, N, M], ascending, one
    // row for each of the N tiles of query_tile queries. A task's queries lie in one tile.
    const int32_t* blocks;
    Strides blocks_strides;
    int64_t block_slots, block_size, query_tile;
};

struct AttendParams {
    const void* query;       // [B, Hq, Tq, D]
    const void* key;         // [B, Hkv, Tk, D], last dimension contiguous
    const void* value;       // [B, Hkv, Tk, Dv], last dimension contiguous
    const int32_t* indices;  // [B, G, Tq, K], last dimension contiguous
    void* out;               // [B, Hq, Tq, Dv], contiguous
    float* lse;              // [B, Hq, Tq], contiguous
    Strides query_strides, key_strides, value_strides, indices_strides;
    int64_t batch, heads, kv_heads, groups, query_length, key_length, head_dim, value_dim;
    int64_t slots;  // K
    float scale;
    float softcap;             // scores are softcap · tanh(scale · q·k / softcap); 0: none
    const float* sink_logits;  // [Hq], contiguous: one more logit per query head, without a value; or null
    DType dtype;
};

}  // namespace sparse_attn
