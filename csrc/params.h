// What the host hands to a kernel: plain pointers, sizes and strides. No torch headers here or in any kernel.
//
// Letters: B batch, Hq query heads, Hkv key/value heads, G selections per batch entry (Hq, Hkv or 1), Tq
// queries, Tk keys, D head dimension, Dv value dimension, K slots per query. Strides count elements and may
// be anything.
#pragma once

#include <cstdint>

namespace sparse_attn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct Strides {
    int64_t b, h, t, d;
};

struct SelectParams {
    const void* query;       // [B, Hq, Tq, D]
    const void* key;         // [B, Hkv, Tk, D]
    const uint8_t* mask;     // bool [B, G, Tq, Tk], 1 = may attend, or null
    const int64_t* lengths;  // [B], each in [0, Tk], or null
    int32_t* indices;        // [B, G, Tq, K], contiguous: the result
    Strides query_strides, key_strides, mask_strides;
    int64_t batch, heads, kv_heads, groups, query_length, key_length, head_dim;
    int64_t top_k;  // K = min(top_k, Tk) of the call
    int64_t window, sinks, causal_offset;
    float scale;
    bool is_causal;
    bool rounded;  // scores of queries and keys rounded to 8 bits, each with its own scale
    DType dtype;
    // If not null, only the keys of a tile's blocks are candidates, R = 1: int32 [B, G, N, M], ascending, one
    // row for each of the N tiles of query_tile queries. A task's queries lie in one tile.
    const int32_t* blocks;
    Strides blocks_strides;
    int64_t block_slots, block_size, query_tile;
};

// Selection by score = Σ_h weight · max(0, q·k) over the Hi heads of a group; G key heads, one per group.
struct IndexerParams {
    SelectParams select;                   // query [B, G·Hi, Tq, D], key [B, G, Tk, D]; no scale
    const float* weights;                  // [B, G·Hi, Tq]
    int64_t weight_b, weight_h, weight_t;  // its strides
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
    DType dtype;
};

// Attention of tiles of queries to whole blocks of keys. `attend.indices` [B, G, N, M] are numbers of blocks,
// one row for each of the N tiles of query_tile queries, M = attend.slots. Blocks are read in chunks of at
// most kBlockChunk keys, each packed once.
struct BlockParams {
    AttendParams attend;
    const int64_t* lengths;  // [B], each in [0, Tk], or null
    int64_t block_size, query_tile, tiles, block_count, chunks_per_block;
    int64_t causal_offset;
    bool is_causal;
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

struct AttendBackwardParams {
    AttendParams forward;   // `out` is not read; `lse` is
    const void* grad_out;   // [B, Hq, Tq, Dv], last dimension contiguous
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    Strides grad_out_strides;
    void* grad_query;    // [B, Hq, Tq, D], contiguous
    void* grad_key;      // [B, Hkv, Tk, D], contiguous
    void* grad_value;    // [B, Hkv, Tk, Dv], contiguous
    float* probability;  // [B, Hq, Tq, K] scratch: P, written by the query pass, read by the key pass
    float* grad_score;   // [B, Hq, Tq, K] scratch: scale · dS, likewise
};

// Variable-width embedding. N ids, D the model width; a band is a table of rows of one width. The host groups
// the ids: `distinct` are the rows that occur, each with the positions where it does.
struct EmbeddingBand {
    const void* table;       // [n, width], rows table_stride apart
    const void* projection;  // [D, width], contiguous, or null where the width is D
    int64_t table_stride, width;
    int64_t first, last;  // its distinct rows
    float* packed;     // scratch for the packed projection, or null where the rows are too few to be worth it
    void* grad_table;  // [n, width], zeros, or with grad_rows [last − first, width]; or null
    void* grad_projection;  // [D, width], or null
    float* sums;            // [last − first, D] scratch: grad_out summed over each row's positions
    float* rows;            // [padded width, last − first] scratch: the rows themselves, in panels
    bool grad_rows;         // a gradient row for each distinct row, not for each row of the table
};

struct EmbeddingParams {
    const EmbeddingBand* bands;
    const int64_t* row;        // [distinct] in its band's table
    const int64_t* starts;     // [distinct + 1] into positions
    const int64_t* positions;  // where each distinct row occurs, ascending
    void* out;                 // [N, D], contiguous
    const void* grad_out;      // [N, D], contiguous
    int64_t embedding_dim;     // D
    int64_t widest;            // the largest width of a band with a projection
    DType dtype;
};

// Distinct rows of one task; a multiple of every instruction set's tile rows.
constexpr int64_t kEmbeddingBlock = 48;

}  // namespace sparse_attn
