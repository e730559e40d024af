// Between cpu/masked_attention.cpp and the kernels that attend by dense tiles. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

// What is chosen stands in rows of bits: bit j % 32 of word j / 32 is key j's.
constexpr int64_t bit_words(int64_t key_length) {
    return (key_length + 31) / 32;
}

// Dense tiles of scores of which a query keeps what its bits say: cheaper than gathering where it keeps many
// of the keys that it sees.
struct MaskedParams {
    SelectParams select;        // query, key, the rule; `indices` is null where nobody wants them
    AttendParams attend;        // likewise
    uint32_t* bits;             // [B, G, Tq, bit_words(Tk)]: written where keys are chosen here; or null
    const void* packed_key;     // [B, Hkv, …] as topk_select packs them
    const float* packed_value;  // [B, Hkv, Dv / tile, Tk + kMaskedChunk, tile], zeros behind the last key
    const uint8_t* special;     // [B, Hkv, Tk]: whether a key's value holds NaN or an infinity
};

constexpr int64_t kMaskedChunk = 128;  // keys of one product with the values

struct MaskedBackwardParams {
    AttendParams forward;   // `lse` is read, `out` and `indices` are not
    const uint32_t* bits;   // [B, G, Tq, bit_words(Tk)]
    const void* out;        // [B, Hq, Tq, Dv]
    const void* grad_out;   // [B, Hq, Tq, Dv]
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    Strides out_strides, grad_out_strides;
    void* grad_query;  // [B, Hq, Tq, D], contiguous
    void* grad_key;    // [B, Hkv, Tk, D], contiguous
    void* grad_value;  // [B, Hkv, Tk, Dv], contiguous
    bool adds;         // to the float32 that stand in grad_query
    int64_t parts;     // of the keys, each a task of its own
    // Scratch. Rows are padded to whole tiles both ways.
    float* queries;    // [B, Hq, rows, D']: scale · q
    float* grads;      // [B, Hq, rows, Dv']: dO
    float* centre;     // [B, Hq, rows]: dO·out − dLSE
    float* lse;        // [B, Hq, rows]: +inf where nothing was attended to
    uint8_t* special;  // [B, Hq, rows]: whether q or dO holds NaN or an infinity
    float* sums;       // [parts, B, Hq, rows, D']: dQ of each part
    int64_t rows;      // of a head, padded
    // Of tail_attention, else null: keys that are seen but not chosen count, too, with one value.
    float* tail;    // [B, Hq, rows]: dO · that value
    float* share;   // [B, Hq, rows]: the weight of each such key
    int32_t* seen;  // [B, Hq, rows, 2]: the first key that is seen, and the one behind the last
    // Of block_tail, else null: how often each key counts, in place of bits; and `seen`.
    uint16_t* counts;  // bfloat16 [B, G, Tq, count_stride]
    int64_t count_stride;
};

namespace cpu {

// Some queries of some heads, whose keys all begin with the same one.
struct MaskedTask {
    int64_t b;
    Range heads, queries;
};

struct MaskedKernels {
    int64_t (*block_queries)(const MaskedParams&);  // at most so many in a task
    int64_t (*packed_value)(const MaskedParams&);   // floats of one key head
    void (*pack)(const MaskedParams&, int64_t b, int64_t kv_head, Range keys);
    int64_t (*scratch_bytes)(const MaskedParams&);
    // Chooses the queries' keys, one head, and attends to them.
    void (*choose)(const MaskedParams&, MaskedTask, void* scratch);
    // Attends to the keys that attend.indices name, in the range. False, and nothing is written, where one is
    // named twice.
    bool (*attend)(const MaskedParams&, MaskedTask, Range keys, void* scratch);
};

struct MaskedBackwardKernels {
    int64_t (*padded_rows)(int64_t rows);  // of the scratch tensors
    int64_t (*padded_width)(int64_t width);
    void (*prepare)(const MaskedBackwardParams&, int64_t b, int64_t head, Range rows);
    // dK and dV of a part of the keys, and that part's dQ.
    int64_t (*scratch_bytes)(const MaskedBackwardParams&);
    void (*part)(const MaskedBackwardParams&, int64_t b, int64_t kv_head, int64_t part, void* scratch);
    void (*finish)(const MaskedBackwardParams&, int64_t b, int64_t head, Range rows);  // dQ
};

}  // namespace cpu

}  // namespace sparse_attn
