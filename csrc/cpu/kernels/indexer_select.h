// Between cpu/indexer_select.cpp and the kernels of indexer_select. No torch headers.
#pragma once

#include "cpu/kernels/topk_select.h"

namespace sparse_attn {

// Selection by score = Σ_h weight · max(0, q·k) over the Hi heads of a group; G key heads, one per group.
struct IndexerParams {
    SelectParams select;                   // query [B, G·Hi, Tq, D], key [B, G, Tk, D]; no scale
    const float* weights;                  // [B, G·Hi, Tq]
    int64_t weight_b, weight_h, weight_t;  // its strides
};

namespace cpu {

struct IndexerKernels {
    int64_t block_queries;  // of one task
    Kernel<IndexerParams, SelectTask> select;
};

}  // namespace cpu

}  // namespace sparse_attn
