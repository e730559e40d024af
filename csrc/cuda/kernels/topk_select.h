// Between cuda/topk_select.cpp and the kernels of topk_select: no torch and no CUDA header. Works in order
// on `stream` of GPU `device` and returns nullptr, or CUDA's own message.
#pragma once

#include "common/params.h"

namespace sparse_attn::cuda {

struct SelectCall {
    SelectParams select;  // query and key with a contiguous last dimension; `rule.lengths` on the device
    const int32_t* narrow_lengths;  // [B]: the lengths, where they are int32
    float* lse;                     // [B, Hq, Tq] scratch where heads share a selection
};

const char* topk_select(const SelectCall& call, int32_t device, void* stream);

}  // namespace sparse_attn::cuda
