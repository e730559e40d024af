// The CPU embedding ops as torch calls them. Defined in cpu_embedding.cpp, registered in bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace sparse_attn {

// out [*ids.shape, D]. A projection without elements stands for none.
torch::stable::Tensor variable_width_embedding_cpu(torch::stable::Tensor ids,
                                                   std::vector<torch::stable::Tensor> tables,
                                                   std::vector<torch::stable::Tensor> projections,
                                                   torch::stable::Tensor token_band,
                                                   torch::stable::Tensor token_row, int64_t padding_idx,
                                                   bool sparse);

// (grad_tables, grad_projections, rows): each B tensors or none. With `sparse`, grad_tables[b] [distinct,
// width] belongs to the table's rows rows[b] [distinct], which ascend.
std::tuple<std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>,
           std::vector<torch::stable::Tensor>>
variable_width_embedding_backward_cpu(torch::stable::Tensor grad_out, torch::stable::Tensor ids,
                                      std::vector<torch::stable::Tensor> tables,
                                      std::vector<torch::stable::Tensor> projections,
                                      torch::stable::Tensor token_band, torch::stable::Tensor token_row,
                                      int64_t padding_idx, bool sparse, bool need_tables,
                                      bool need_projections);

}  // namespace sparse_attn
