// Between cpu/selection.cpp and the kernels that select by bounds (lib/bounds.h). No torch headers.
#pragma once

#include "cpu/kernels/topk_select.h"

namespace sparse_attn {

namespace cpu {

// How many of the keys that some rows saw had to be kept as candidates, and how many were scored exactly.
struct Survivors {
    int64_t rows, budget, kept, scored;
};

struct BoundsKernels {
    // Whether these kernels can take such a selection, and whether they are the faster ones for it.
    bool (*takes)(const SelectParams&);
    bool (*pays)(const SelectParams&);
    // The number of bits to round to, for SelectParams::bounds_bits; where there are no kernels for 8 or 9,
    // they do with 16.
    int (*bits)(const SelectParams&);

    // Rounded keys in panels: bytes of one (batch, key head), the shift of its keys, and then the packing of
    // some of its panels (as many as SelectKernels::panel_count).
    int64_t (*packed_head_bytes)(const SelectParams&);
    void (*find_shift)(const SelectParams&, int64_t b, int64_t kv_head, void* packed_head);
    void (*pack_keys)(const SelectParams&, int64_t b, int64_t kv_head, Range panels, void* packed_head);

    // Selects for a task of SelectKernels::block_queries; `packed` are the rounded keys of all heads. False
    // where the bounds prune too little for some row: what is written then is of no use.
    int64_t (*scratch_bytes)(const SelectParams&);
    bool (*select)(const SelectParams&, SelectTask, void* scratch, Survivors*);
};

}  // namespace cpu

}  // namespace sparse_attn
