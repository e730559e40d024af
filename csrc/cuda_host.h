// The CUDA ops as torch calls them. Defined in cuda_host.cpp, registered in bindings.cpp.
#pragma once

#ifdef SPARSE_ATTN_HAVE_CUDA

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace sparse_attn {

// fill_indices.cuda(Tensor(a!) indices, int value) -> ()      indices int32 [...], contiguous
void fill_indices_cuda(torch::stable::Tensor indices, int64_t value);

}  // namespace sparse_attn

#endif
