// Between csrc/cuda_attention.cpp and the attention kernels: no torch and no CUDA header. Each function works
// in order on `stream` of GPU `device` and returns nullptr, or CUDA's own message.
#pragma once

#include "../params.h"

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

// Which queries attend to each key: those of key j of selection n = b·G + g are
// queries[n·Tq·K + starts[n·(Tk + 1) + j] …], ascending.
struct KeyLists {
    int64_t* starts;   // [B·G, Tk + 1]
    int32_t* counts;   // [B·G, blocks, Tk] scratch
    int32_t* queries;  // [B·G, Tq·K]
    int64_t blocks;    // of queries that are counted on their own: key_list_blocks(p)
};
int64_t key_list_blocks(const AttendParams& p);

struct AttendGradients {
    AttendParams forward;   // `out` is read, `lse` is not
    const void* grad_out;   // [B, Hq, Tq, Dv], contiguous
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    void* grad_query;       // [B, Hq, Tq, D], contiguous
    void* grad_key;         // [B, Hkv, Tk, D], contiguous
    void* grad_value;       // [B, Hkv, Tk, Dv], contiguous
    RowSoftmax* rows;       // [B, Hq, Tq] scratch
    KeyLists lists;
};
const char* gathered_attention_backward(const AttendGradients& g, int32_t device, void* stream);

}  // namespace sparse_attn::cuda
