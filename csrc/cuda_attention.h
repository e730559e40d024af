// The attention ops of the CUDA wing as torch calls them. Defined in cuda_attention.cpp, registered in
// bindings.cpp; shapes as in params.h.
#pragma once

#ifdef SPARSE_ATTN_HAVE_CUDA

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace sparse_attn {

torch::stable::Tensor topk_select_cuda(torch::stable::Tensor query, torch::stable::Tensor key,
                                       std::optional<torch::stable::Tensor> attn_mask,
                                       std::optional<torch::stable::Tensor> key_lengths, int64_t top_k,
                                       bool is_causal, int64_t causal_offset, double scale, int64_t window,
                                       int64_t sinks, int64_t groups);

// (out, lse, indices)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> topk_attention_cuda(
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    std::optional<torch::stable::Tensor> attn_mask, std::optional<torch::stable::Tensor> key_lengths,
    int64_t top_k, bool is_causal, int64_t causal_offset, double scale, int64_t window, int64_t sinks,
    int64_t groups);

// (out, lse)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> gathered_attention_cuda(
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    torch::stable::Tensor indices, double scale);

// (grad_query, grad_key, grad_value)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
gathered_attention_backward_cuda(torch::stable::Tensor grad_out,
                                 std::optional<torch::stable::Tensor> grad_lse, torch::stable::Tensor query,
                                 torch::stable::Tensor key, torch::stable::Tensor value,
                                 torch::stable::Tensor indices, torch::stable::Tensor out,
                                 torch::stable::Tensor lse, double scale, bool atomics);

}  // namespace sparse_attn

#endif
