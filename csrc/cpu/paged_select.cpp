// paged_select on the CPU: topk_select's selection for packed sequences whose keys lie in pages.
#include <torch/csrc/stable/library.h>

#include "cpu/packed.h"

namespace sparse_attn {
namespace {

Tensor paged_select_cpu(Tensor query, Tensor key, Tensor block_table, int64_t top_k,
                        SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "paged_select.cpu";
    STD_TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && key.dim() == 4 && query.size(3) == key.size(3) &&
                        query.size(3) > 0 && key.size(1) > 0 && key.size(2) > 0 && query.size(1) > 0 &&
                        query.size(1) % key.size(1) == 0 && query.scalar_type() == key.scalar_type(),
                    op, ": query [1, Hq, T, D] and key [P, Hkv, page size, D] must agree; got ", shape_of(query),
                    " and ", shape_of(key));
    STD_TORCH_CHECK(block_table.dim() == 2 && block_table.scalar_type() == ScalarType::Int &&
                        block_table.is_contiguous() && !block_table.is_cuda() &&
                        block_table.numel() <= (std::numeric_limits<int32_t>::max() - 64) / key.size(2),
                    op, ": block_table must be int32 [S, pages], contiguous, of fewer than 2^31 keys; got ",
                    shape_of(block_table));
    STD_TORCH_CHECK(!attn_mask && !key_lengths && key_starts && causal_offsets, op,
                    ": the rule must be that of packed sequences, with key_starts and causal_offsets");
    key = with_contiguous_rows(key);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    SelectParams& p = s.params;
    p.key_length = block_table.numel() * key.size(2);
    p.top_k = std::min(top_k, p.key_length);
    STD_TORCH_CHECK(p.rule.is_causal, op, ": the rule must be causal");
    for (int64_t i = 0; i < p.query_length; ++i)
        STD_TORCH_CHECK(p.rule.last_key(0, i) < p.key_length, op,
                        ": causal_offsets must not pass the last key; got one of query ", i);
    Tensor indices = new_indices(query, p);
    if (indices.numel() > 0)
        select_paged(s, static_cast<const int32_t*>(block_table.const_data_ptr()), key.size(2), key.size(0));
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("paged_select.cpu(Tensor query, Tensor key, Tensor block_table, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ") -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("paged_select.cpu", TORCH_BOX(&sparse_attn::paged_select_cpu));
}
