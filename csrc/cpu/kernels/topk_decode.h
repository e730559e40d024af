// Between cpu/topk_decode.cpp and its kernels: the selection of a few queries, whose price is the reading of
// the keys. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

// 8-bit rows of the keys (lib/decode_index.h), or nulls. Of keys in pages, each page is a B, and the shift
// that of all, [Hkv, D].
struct KeyIndexParams {
    const int8_t* codes;  // [B, Hkv, N, ⌈D/4⌉, 16, 4]: four components each of 16 keys, k̂ / scale
    const float* bounds;  // [B, Hkv, N, 3, 16]: scale, ≥ ‖k − μ − k̂‖, ≥ ‖k − μ‖
    const float* shift;   // [B, Hkv, D]: μ
    int64_t blocks;       // N
};

// Keys in pages [P, Hkv, size, D], P strides key_strides.b apart: key j lies in page table[(first + j) /
// size]. Without a table keys are rows key_strides.t apart.
struct KeyPages {
    const int32_t* table;  // each entry a page that there is
    int64_t first, size;
};

struct DecodeParams {
    SelectParams select;  // neither rounded nor with blocks; the components of a key lie side by side
    KeyPages pages;       // with a table: of one sequence, B = 1
    int64_t
        group_rows;  // rows of `indices` from one group to the next: Tq, or more where it is a part of them
    int64_t chunk, chunks;  // a head's keys are scanned in chunks of so many panels
    // Key heads of a task, which lie side by side where they are several; 1 with an index.
    int64_t heads;
    // A selection per head: the best of each chunk, ascending.
    int64_t kept;           // so many of each at most
    float* best_scores;     // [B, Hq, Tq, chunks, room]
    int32_t* best_indices;  // likewise
    int32_t* best_counts;   // [B, Hq, Tq, chunks]
    int64_t room;           // kept; with an index and several chunks, room for what bounds leave of a chunk
    // With an index and several chunks, where bounds are of use: what they leave of a chunk, best_scores
    // being lower bounds and these the upper ones, and −1 − its count for a count. Else null.
    float* best_above;
    KeyIndexParams index;
    // One selection for several heads: all scores, then probabilities without their factor, and that factor.
    int64_t length;  // whole panels
    float* scores;   // [B, Hq, Tq, length]
    float* weights;  // [B, Hq, Tq]
};

namespace cpu {

constexpr int kIndexKeys = 16;  // of a block

// A chunk of the keys of DecodeParams::heads key heads, of which this is the first, for all queries of all
// heads that use them.
struct DecodeChunk {
    int64_t b, kv_head, chunk;
};
struct DecodeRow {
    int64_t b, head, query;  // a query head, or the group of a selection
};

struct DecodeKernels {
    int64_t (*panels)(const SelectParams&);  // of one key head
    int64_t (*panel_keys)();
    int64_t (*index_room)(int64_t kept);     // of best_scores with an index
    Kernel<DecodeParams, DecodeChunk> scan;  // to best_…, or to scores where heads share
    void (*weigh)(const DecodeParams&, DecodeRow,
                  void* scratch);            // where heads share: a head's probabilities
    Kernel<DecodeParams, DecodeRow> choose;  // of a group: its row of indices; its scratch serves weigh too
};

}  // namespace cpu

}  // namespace sparse_attn
