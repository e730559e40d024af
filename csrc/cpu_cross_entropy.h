// variable_width_cross_entropy on the CPU as torch calls it. Defined in cpu_cross_entropy.cpp, registered in
// bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sparse_attn {

// (loss [N], lse [N]), float32; 0 where the target is ignore_index. A projection [0, 0] stands for none.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> variable_width_cross_entropy_cpu(
    torch::stable::Tensor hidden, torch::stable::Tensor targets, std::vector<torch::stable::Tensor> tables,
    std::vector<torch::stable::Tensor> projections, torch::stable::Tensor token_band,
    torch::stable::Tensor token_row, std::optional<torch::stable::Tensor> weight, int64_t ignore_index,
    double label_smoothing);

// (grad_hidden, grad_tables, grad_projections)
std::tuple<torch::stable::Tensor, std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>>
variable_width_cross_entropy_backward_cpu(torch::stable::Tensor grad_loss, torch::stable::Tensor grad_lse,
                                          torch::stable::Tensor hidden, torch::stable::Tensor targets,
                                          std::vector<torch::stable::Tensor> tables,
                                          std::vector<torch::stable::Tensor> projections,
                                          torch::stable::Tensor token_band, torch::stable::Tensor token_row,
                                          std::optional<torch::stable::Tensor> weight,
                                          torch::stable::Tensor lse, int64_t ignore_index,
                                          double label_smoothing);

}  // namespace sparse_attn
