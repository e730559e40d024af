// topk_attention on CUDA: the two ops, one after the other.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/attention.h"
#include "common/tensors.h"

namespace sparse_attn {

Tensor topk_select_cuda(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, bool rounded,
                        std::optional<Tensor> blocks_of, int64_t block_size, int64_t query_tile);
std::tuple<Tensor, Tensor> gathered_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                   double scale, double softcap,
                                                   std::optional<Tensor> sink_logits);

namespace {

// Two launches, one after the other: what the first selects is still in the second-level cache for the
// second.
std::tuple<Tensor, Tensor, Tensor> topk_attention_cuda(Tensor query, Tensor key, Tensor value, int64_t top_k,
                                                       SPARSE_ATTN_RULE_PARAMETERS) {
    Tensor indices =
        topk_select_cuda(query, key, top_k, SPARSE_ATTN_RULE_ARGUMENTS, false, std::nullopt, 1, 1);
    auto [out, lse] = gathered_attention_cuda(query, key, value, indices, scale, softcap, sink_logits);
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("topk_attention.cuda(Tensor query, Tensor key, Tensor value, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ") -> (Tensor out, Tensor lse, Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, m) {
    m.impl("topk_attention.cuda", TORCH_BOX(&sparse_attn::topk_attention_cuda));
}
