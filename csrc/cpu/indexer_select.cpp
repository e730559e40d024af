// indexer_select on the CPU, from torch's tensors to the kernels.
#include "cpu/kernels/indexer_select.h"

#include <torch/csrc/stable/library.h>

#include "cpu/selection.h"

SPARSE_ATTN_FIND_KERNELS(indexer_select, IndexerKernels)

namespace sparse_attn {
namespace {

Tensor indexer_select_cpu(Tensor query, Tensor key, Tensor weights, int64_t top_k,
                          SPARSE_ATTN_RULE_PARAMETERS, bool int8) {
    const char* op = "indexer_select.cpu";
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS}, int8);
    STD_TORCH_CHECK(s.params.rule.groups == key.size(1), op,
                    ": a key head is one group's; got groups=", s.params.rule.groups, " and key ",
                    shape_of(key));
    STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.dim() == 3 &&
                        weights.size(0) == query.size(0) && weights.size(1) == query.size(1) &&
                        weights.size(2) == query.size(2),
                    op, ": weights must be float32 [B, G·Hi, Tq]; got ", shape_of(weights));
    SelectParams& p = s.params;
    Tensor indices = new_indices(query, p);
    if (indices.numel() == 0) return indices;
    const cpu::IndexerKernels& k = cpu::indexer_select_kernels();
    pack_keys(s, k.block_queries);
    const IndexerParams indexer{p, static_cast<const float*>(weights.const_data_ptr()), weights.stride(0),
                                weights.stride(1), weights.stride(2)};
    for_each_task(p.batch * p.rule.groups * s.per_head, k.select.scratch_bytes(indexer), s.parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, p.rule.groups, s.per_head, s.block, p.query_length);
                      k.select.run(indexer, {t.b, t.group, t.queries, s.packed.get()}, scratch);
                  });
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(  // scale is not used: an indexer's weights have it
        "indexer_select.cpu(Tensor query, Tensor key, Tensor weights, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
        ", bool int8) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("indexer_select.cpu", TORCH_BOX(&sparse_attn::indexer_select_cpu));
}
