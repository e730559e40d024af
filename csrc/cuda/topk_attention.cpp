// topk_attention on CUDA: the two ops, one after the other.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"

namespace sparse_attn {

Tensor topk_select_cuda(Tensor query, Tensor key, int64_t top_k, std::optional<Tensor> attn_mask,
                        std::optional<Tensor> key_lengths, std::optional<Tensor> key_starts,
                        std::vector<int64_t> rule, double scale, bool rounded,
                        std::optional<Tensor> blocks_of, int64_t block_size, int64_t query_tile);
std::tuple<Tensor, Tensor> gathered_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                   double scale);

namespace {

// Two launches, one after the other: what the first selects is still in the second-level cache for the
// second.
std::tuple<Tensor, Tensor, Tensor> topk_attention_cuda(Tensor query, Tensor key, Tensor value, int64_t top_k,
                                                       std::optional<Tensor> attn_mask,
                                                       std::optional<Tensor> key_lengths,
                                                       std::optional<Tensor> key_starts,
                                                       std::vector<int64_t> rule, double scale) {
    Tensor indices = topk_select_cuda(query, key, top_k, attn_mask, key_lengths, key_starts, rule, scale,
                                      false, std::nullopt, 1, 1);
    auto [out, lse] = gathered_attention_cuda(query, key, value, indices, scale);
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "topk_attention.cuda(Tensor query, Tensor key, Tensor value, SymInt top_k, Tensor? attn_mask, "
        "Tensor? key_lengths, Tensor? key_starts, SymInt[] rule, float scale) -> (Tensor out, Tensor lse, "
        "Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("topk_attention.cuda", TORCH_BOX(&sparse_attn::topk_attention_cuda));
}
