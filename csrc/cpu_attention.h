// The CPU attention ops as torch calls them. Defined in cpu_selection.cpp, cpu_attention.cpp and
// cpu_block_attention.cpp, registered
// in bindings.cpp; shapes as in params.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace sparse_attn {

torch::stable::Tensor topk_select_cpu(torch::stable::Tensor query, torch::stable::Tensor key,
                                      std::optional<torch::stable::Tensor> attn_mask,
                                      std::optional<torch::stable::Tensor> key_lengths, int64_t top_k,
                                      bool is_causal, int64_t causal_offset, double scale, int64_t window,
                                      int64_t sinks, int64_t groups);

torch::stable::Tensor quantized_select_cpu(torch::stable::Tensor query, torch::stable::Tensor key,
                                           std::optional<torch::stable::Tensor> attn_mask,
                                           std::optional<torch::stable::Tensor> key_lengths, int64_t top_k,
                                           bool is_causal, int64_t causal_offset, double scale,
                                           int64_t window, int64_t sinks, int64_t groups);

torch::stable::Tensor indexer_select_cpu(torch::stable::Tensor query, torch::stable::Tensor key,
                                         torch::stable::Tensor weights,
                                         std::optional<torch::stable::Tensor> attn_mask,
                                         std::optional<torch::stable::Tensor> key_lengths, int64_t top_k,
                                         bool is_causal, int64_t causal_offset, int64_t window, int64_t sinks,
                                         bool int8);

torch::stable::Tensor refine_blocks_cpu(torch::stable::Tensor query, torch::stable::Tensor key,
                                        torch::stable::Tensor blocks_of,
                                        std::optional<torch::stable::Tensor> key_lengths, int64_t top_k,
                                        int64_t block_size, int64_t query_tile, bool is_causal,
                                        int64_t causal_offset, double scale, int64_t window, int64_t sinks,
                                        int64_t groups);

// (out, lse)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> gathered_attention_cpu(torch::stable::Tensor query,
                                                                                torch::stable::Tensor key,
                                                                                torch::stable::Tensor value,
                                                                                torch::stable::Tensor indices,
                                                                                double scale);

// (out, lse)
std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_attention_cpu(
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    torch::stable::Tensor blocks_of, std::optional<torch::stable::Tensor> key_lengths, int64_t block_size,
    int64_t query_tile, bool is_causal, int64_t causal_offset, double scale);

// (grad_query, grad_key, grad_value)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> block_attention_backward_cpu(
    torch::stable::Tensor grad_out, std::optional<torch::stable::Tensor> grad_lse, torch::stable::Tensor lse,
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    torch::stable::Tensor blocks_of, std::optional<torch::stable::Tensor> key_lengths, int64_t block_size,
    int64_t query_tile, bool is_causal, int64_t causal_offset, double scale);

// (grad_query, grad_key, grad_value)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
gathered_attention_backward_cpu(torch::stable::Tensor grad_out, std::optional<torch::stable::Tensor> grad_lse,
                                torch::stable::Tensor query, torch::stable::Tensor key,
                                torch::stable::Tensor value, torch::stable::Tensor indices,
                                torch::stable::Tensor out, torch::stable::Tensor lse, double scale,
                                bool atomics);

// (out, lse, indices)
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> topk_attention_cpu(
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    std::optional<torch::stable::Tensor> attn_mask, std::optional<torch::stable::Tensor> key_lengths,
    int64_t top_k, bool is_causal, int64_t causal_offset, double scale, int64_t window, int64_t sinks,
    int64_t groups);

}  // namespace sparse_attn
