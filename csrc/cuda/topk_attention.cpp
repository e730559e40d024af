// topk_attention on CUDA: the two ops, one after the other.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/tensors.h"

namespace sparse_attn {

Tensor topk_select_cuda(Tensor query, Tensor key, std::optional<Tensor> attn_mask,
                        std::optional<Tensor> key_lengths, int64_t top_k, bool is_causal,
                        int64_t causal_offset, double scale, int64_t window, int64_t sinks, int64_t groups);
std::tuple<Tensor, Tensor> gathered_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                   double scale);

namespace {

// Two launches, one after the other: what the first selects is still in the second-level cache for the
// second.
std::tuple<Tensor, Tensor, Tensor> topk_attention_cuda(Tensor query, Tensor key, Tensor value,
                                                       std::optional<Tensor> attn_mask,
                                                       std::optional<Tensor> key_lengths, int64_t top_k,
                                                       bool is_causal, int64_t causal_offset, double scale,
                                                       int64_t window, int64_t sinks, int64_t groups) {
    Tensor indices = topk_select_cuda(query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset,
                                      scale, window, sinks, groups);
    auto [out, lse] = gathered_attention_cuda(query, key, value, indices, scale);
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "topk_attention.cuda(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, "
        "SymInt top_k, bool is_causal, SymInt causal_offset, "
        "float scale, SymInt window, SymInt sinks, SymInt groups) "
        "-> (Tensor out, Tensor lse, Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("topk_attention.cuda", TORCH_BOX(&sparse_attn::topk_attention_cuda));
}
