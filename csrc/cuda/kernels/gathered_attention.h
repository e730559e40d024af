// Between cuda/gathered_attention.cpp and the attention kernels: no torch and no CUDA header. Each function
// works in order on `stream` of GPU `device` and returns nullptr, or CUDA's own message.
#pragma once

#include "common/params.h"

namespace sparse_attn::cuda {

constexpr int64_t kMostDim = 256;  // of D and Dv
// From this many query heads on that share their keys and their selection, half types go to the tensor cores.
constexpr int64_t kTileHeads = 8;

// Heads that share both their keys and their row of indices.
inline int64_t heads_that_share(const AttendParams& p) {
    return p.heads / (p.groups > p.kv_heads ? p.groups : p.kv_heads);
}

// The rows of query, key and value have a contiguous last dimension. Writes p.out and p.lse.
const char* gathered_attention(const AttendParams& p, int32_t device, void* stream);
// The same on tensor cores, for half types: gathered_attention() calls it where heads share enough.
const char* gathered_attention_tiles(const AttendParams& p, int32_t device, void* stream);

// Softmax of a row, for the pass over the keys: P = exp2(score − maximum) · inverse,
// dS = P · (dP − centre); the scores are in base 2.
struct alignas(16) RowSoftmax {
    float maximum, inverse, centre, unused;
};

// Where each key is selected: for key j by selection n = b·G + g, in
// queries[n·Tq·K + starts[n·(Tk + 1) + j] …], ascending.
struct KeyLists {
    int64_t* starts;   // [B·G, Tk + 1]
    int64_t* counts;   // [B·G, blocks, range] scratch
    int32_t* queries;  // [B·G, Tq·K]: queries t, or places t·K + slot
    int64_t blocks;    // of queries that are counted on their own: key_list_blocks(p)
    int64_t range;     // keys that are counted at a time: key_list_range(p, blocks)
};
int64_t key_list_blocks(const AttendParams& p);
int64_t key_list_range(const AttendParams& p, int64_t blocks);
// Fills them; of p only `indices` and the sizes are read. With `places`, Tq·K must be below 2^31.
const char* list_keys(const AttendParams& p, const KeyLists& lists, bool places, int32_t device,
                      void* stream);

struct AttendGradients {
    AttendParams forward;   // `out` and `lse` are read
    const void* grad_out;   // [B, Hq, Tq, Dv], contiguous
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    void* grad_query;       // [B, Hq, Tq, D], contiguous
    void* grad_key;         // [B, Hkv, Tk, D], contiguous
    void* grad_value;       // [B, Hkv, Tk, Dv], contiguous
    RowSoftmax* rows;       // [B, Hq, Tq] scratch, unless on tensor cores
    KeyLists lists;         // of `chunk` queries; not with atomics
    // On tensor cores alone:
    int64_t chunk;    // queries that are worked on at a time: those of gradient_chunk(p)
    float* partials;  // [B, Hkv, head tiles, chunk, K, D + Dv] scratch: dK and dV of each place; not with
                      // atomics
    float* sums;      // [B, Hkv, Tk, D + Dv] scratch; null with one chunk and no atomics
    bool atomics;     // sums by atomic additions: their order, and the last bits, differ from call to call
};

// How the backward works: on tensor cores for half types where heads share enough, else by lists of queries.
bool gradients_on_tiles(const AttendParams& p);
// Queries of a chunk, Tq without tensor cores, and what its partials take.
int64_t gradient_chunk(const AttendParams& p);
int64_t partial_floats(const AttendParams& p, int64_t chunk);
const char* gathered_attention_backward(const AttendGradients& g, int32_t device, void* stream);
// The same on tensor cores: gathered_attention_backward() calls it where gradients_on_tiles(p).
const char* gathered_attention_backward_tiles(const AttendGradients& g, int32_t device, void* stream);

}  // namespace sparse_attn::cuda
