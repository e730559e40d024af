// variable_width_embedding of the CUDA wing as torch calls it, as in cpu_embedding.h. Defined in
// cuda_embedding.cpp, registered in bindings.cpp. Dense gradients alone: the number of rows of a sparse one
// would have to come back from the GPU.
#pragma once

#ifdef SPARSE_ATTN_HAVE_CUDA

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace sparse_attn {

// out [*ids.shape, D]. A projection without elements stands for none.
torch::stable::Tensor variable_width_embedding_cuda(torch::stable::Tensor ids,
                                                    std::vector<torch::stable::Tensor> tables,
                                                    std::vector<torch::stable::Tensor> projections,
                                                    torch::stable::Tensor token_band,
                                                    torch::stable::Tensor token_row, int64_t padding_idx,
                                                    bool sparse);

// (grad_tables, grad_projections, no rows): each B tensors or none.
std::tuple<std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>,
           std::vector<torch::stable::Tensor>>
variable_width_embedding_backward_cuda(torch::stable::Tensor grad_out, torch::stable::Tensor ids,
                                       std::vector<torch::stable::Tensor> tables,
                                       std::vector<torch::stable::Tensor> projections,
                                       torch::stable::Tensor token_band, torch::stable::Tensor token_row,
                                       int64_t padding_idx, bool sparse, bool need_tables,
                                       bool need_projections);

}  // namespace sparse_attn

#endif
