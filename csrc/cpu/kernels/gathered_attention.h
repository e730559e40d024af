// Between cpu/gathered_attention.cpp and the kernels of gathered_attention. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

struct AttendBackwardParams {
    AttendParams forward;   // `out` is not read; `lse` is
    const void* grad_out;   // [B, Hq, Tq, Dv], last dimension contiguous
    const float* grad_lse;  // [B, Hq, Tq], contiguous, or null
    Strides grad_out_strides;
    void* grad_query;  // [B, Hq, Tq, D], contiguous
    void* grad_key;    // [B, Hkv, Tk, D], contiguous
    void* grad_value;  // [B, Hkv, Tk, Dv], contiguous
    // [B, Hq, Tq, K] scratch, what the passes leave to each other. Where `probability` is null the key pass
    // goes first and makes scale · dS, else the query pass, which makes both P and scale · dS.
    float *probability, *grad_score;
    // Where the key pass goes first, or `out` and `lse` are of more keys than these; else null.
    const void* out;  // [B, Hq, Tq, Dv]
    Strides out_strides;
    float* centre;  // [B, Hq, Tq] scratch: dO·out − dLSE
};

namespace cpu {

// A block of queries of some query heads.
struct AttendTask {
    int64_t b;
    Range heads, queries;
    const float* logits = nullptr;  // of these queries of one head, as SelectTask has them, or null
};
using AttendKernel = Kernel<AttendParams, AttendTask>;

struct AttendBackwardKernels {
    Kernel<AttendBackwardParams, AttendTask> query;  // dQ
    void (*centre)(const AttendBackwardParams&, int64_t b, int64_t head, Range queries);
    // dK and dV of a block of keys.
    int64_t (*key_scratch_bytes)(const AttendBackwardParams&, int64_t block_keys);
    void (*key)(const AttendBackwardParams&, int64_t b, int64_t kv_head, Range keys, void* scratch);
};

}  // namespace cpu

}  // namespace sparse_attn
