// Between cpu/block_attention.cpp and the kernels of block_attention. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

// Attention of tiles of queries to whole blocks of keys. `attend.indices` [B, G, N, M] are numbers of blocks,
// one row for each of the N tiles of query_tile queries, M = attend.slots. Blocks are read in chunks of at
// most kBlockChunk keys, each packed once.
struct BlockParams {
    AttendParams attend;
    Rule rule;  // without mask, and keeps nothing always
    int64_t block_size, query_tile, tiles, block_count, chunks_per_block;
    float* packed_key;    // [B, Hkv, chunks, …]
    float* packed_value;  // [B, Hkv, chunks, …]
    uint8_t* special;     // [B, Hkv, chunks]: whether the values of the chunk hold NaN or an infinity
};

constexpr int64_t kBlockChunk = 64;

struct BlockBackwardParams {
    BlockParams forward;    // `attend.out` and the packed keys are not read; `attend.lse` is
    const void* grad_out;   // [B, Hq, Tq, Dv]
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    Strides grad_out_strides;
    void* grad_query;       // [B, Hq, Tq, D], contiguous
    void* grad_key;         // [B, Hkv, Tk, D], contiguous
    void* grad_value;       // [B, Hkv, Tk, Dv], contiguous
    float* centre;          // [B, Hq, Tq] scratch: Σ P∘dP − dLSE, written by the query pass
    const int64_t* starts;  // [B·G·blocks + 1] into tiles_of: which tiles chose a block, ascending
    const int32_t* tiles_of;
};

namespace cpu {

// One tile of queries of some heads that share a key head and a row of blocks.
struct TileTask {
    int64_t b;
    Range heads;
    int64_t tile;
};

struct BlockKernels {
    int64_t (*packed_key)(const BlockParams&);  // floats of one packed chunk
    int64_t (*packed_value)(const BlockParams&);
    void (*pack)(const BlockParams&, int64_t b, int64_t kv_head, Range chunks);
    Kernel<BlockParams, TileTask> attend;
};

struct BlockBackwardKernels {
    Kernel<BlockBackwardParams, TileTask> query;  // dQ
    // dK and dV of one chunk of keys.
    int64_t (*key_scratch_bytes)(const BlockBackwardParams&);
    void (*key)(const BlockBackwardParams&, int64_t b, int64_t kv_head, int64_t chunk, void* scratch);
};

}  // namespace cpu

}  // namespace sparse_attn
