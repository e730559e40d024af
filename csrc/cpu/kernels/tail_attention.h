// Between cpu/tail_attention.cpp and the kernels of tail_attention. No torch headers.
#pragma once

#include "cpu/kernels/masked_attention.h"

namespace sparse_attn {

struct TailParams {
    SelectParams select;        // query, key and the rule, which has no mask
    AttendParams attend;        // likewise, and the chosen keys
    float* outside;             // [B, Hq, Tq]: the probability of the keys that are left out
    const void* packed_key;     // [B, Hkv, …] as topk_select packs them
    const float* packed_value;  // as masked_attention packs them; null: the chosen ones are gathered
    const double* prefix;       // [B, Hkv, Tk + 1, Dv]: sums of the first values
    const uint8_t* special;     // [B, Hkv]: whether a value of the head is NaN or an infinity
};

namespace cpu {

struct TailKernels {
    // prefix and special of one key head.
    void (*sum_values)(const TailParams&, int64_t b, int64_t kv_head);
    int64_t (*block_queries)(const TailParams&);  // of one task
    Kernel<TailParams, MaskedTask> attend;
    // Of the backward, for some queries of a head: dO · mean of what is left out, the weight of each key that
    // is left out, and which keys the query sees. `outside` is read.
    int64_t (*gradient_scratch_bytes)(const TailParams&);
    void (*prepare)(const TailParams&, const MaskedBackwardParams&, MaskedTask, void* scratch);
};

}  // namespace cpu

}  // namespace sparse_attn
