// indexer_select on the CPU, from torch's tensors to the kernels.
#include "cpu/kernels/indexer_select.h"

#include <torch/csrc/stable/library.h>

#include "cpu/selection.h"

SPARSE_ATTN_FIND_KERNELS(indexer_select, IndexerKernels)

namespace sparse_attn {
namespace {

Tensor indexer_select_cpu(Tensor query, Tensor key, Tensor weights, std::optional<Tensor> attn_mask,
                          std::optional<Tensor> key_lengths, int64_t top_k, bool is_causal,
                          int64_t causal_offset, int64_t window, int64_t sinks, bool int8) {
    const char* op = "indexer_select.cpu";
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, 1.0, window,
                      sinks, key.size(1), int8);
    STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.dim() == 3 &&
                        weights.size(0) == query.size(0) && weights.size(1) == query.size(1) &&
                        weights.size(2) == query.size(2),
                    op, ": weights must be float32 [B, G·Hi, Tq]; got ", shape_of(weights));
    SelectParams& p = s.params;
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.groups, p.query_length, p.top_k}, ScalarType::Int);
    if (indices.numel() == 0) return indices;
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    const cpu::IndexerKernels& k = cpu::indexer_select_kernels();
    pack_keys(s, k.block_queries);
    const IndexerParams indexer{p, static_cast<const float*>(weights.const_data_ptr()), weights.stride(0),
                                weights.stride(1), weights.stride(2)};
    for_each_task(p.batch * p.groups * s.per_head, k.select.scratch_bytes(indexer), s.parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, p.groups, s.per_head, s.block, p.query_length);
                      k.select.run(indexer, {t.b, t.group, t.queries, s.packed.get()}, scratch);
                  });
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "indexer_select.cpu(Tensor query, Tensor key, Tensor weights, Tensor? attn_mask, Tensor? "
        "key_lengths, "
        "SymInt top_k, bool is_causal, SymInt causal_offset, SymInt window, SymInt sinks, bool int8) -> "
        "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("indexer_select.cpu", TORCH_BOX(&sparse_attn::indexer_select_cpu));
}
