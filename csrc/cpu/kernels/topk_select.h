// Between cpu/selection.cpp and the kernels of topk_select. No torch headers.
#pragma once

#include "cpu/kernels/lib/kernel.h"

namespace sparse_attn {

namespace cpu {

// Some queries of one selection, and the packed keys of all heads (null where no score is needed).
struct SelectTask {
    int64_t b, group;
    Range queries;
    const void* packed;
    // [block_queries, K] for the sums q·k of the chosen keys, where somebody wants them and bounds make them
    // in the order in which attention does; rows without have NaN first.
    float* logits = nullptr;
};

struct SelectKernels {
    // Keys in panels for the score tiles: bytes of one (batch, key head), and the packing of some of its
    // panels.
    int64_t (*packed_head_bytes)(const SelectParams&);
    int64_t (*panel_count)(const SelectParams&);
    void (*pack_keys)(const SelectParams&, int64_t b, int64_t kv_head, Range panels, void* packed_head);

    int64_t (*block_queries)(const SelectParams&);  // of one task
    Kernel<SelectParams, SelectTask> select;
};

}  // namespace cpu

}  // namespace sparse_attn
