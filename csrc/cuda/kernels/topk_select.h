// Between cuda/topk_select.cpp and the kernels of topk_select: no torch and no CUDA header. Works in order
// on `stream` of GPU `device` and returns nullptr, or CUDA's own message.
#pragma once

#include "common/params.h"

namespace sparse_attn::cuda {

constexpr int64_t kMostSelectDim = 256;

// How a selection is spread over a GPU.
struct SelectPlan {
    int64_t blocks;              // that are launched: what the GPU works on at once
    int64_t capacity;            // candidates of a query, of each of a block's 64
    int64_t packed;              // groups whose queries are rows of the same tiles
    int64_t splits, split_keys;  // pieces that the keys are in, and keys of a piece
    int64_t stride;         // each stride-th key is in the sample of a row's first threshold; 1: no sample
    int64_t sample_budget;  // the threshold is the score of this place in the sample
    int64_t candidate_bytes, part_bytes, lse_bytes, lse_part_bytes;  // of scratch
};
SelectPlan select_plan(const SelectParams& p, int32_t device);

struct SelectCall {
    SelectParams select;  // query and key with a contiguous last dimension; `rule.lengths` on the device
    SelectPlan plan;
    const int32_t* narrow_lengths;  // [B]: the lengths, where they are int32
    // Scratch:
    float* lse;        // [B, Hq, Tq], where heads share a selection
    float* lse_parts;  // [splits, B, Hq, Tq, 2]: the same of each piece of the keys
    void* candidates;  // [blocks, 64, capacity]
    void* parts;       // [B, G, Tq, splits, K]: the best of each piece
};

const char* topk_select(const SelectCall& call, int32_t device, void* stream);
// The same where heads share a selection, and in float32, up to the merge: topk_select() calls it.
const char* select_gathered(const SelectCall& call, int32_t device, void* stream);
int64_t gathered_blocks(const SelectParams& p, int32_t device);  // that the GPU holds at once

}  // namespace sparse_attn::cuda
