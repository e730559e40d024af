// topk_attention on the CPU: selection and attention of a block of queries in one task.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/gathered_attention.h"
#include "cpu/masked_attention.h"
#include "cpu/packed.h"

SPARSE_ATTN_FIND_KERNELS(gathered_attention, AttendKernel)

namespace sparse_attn {
namespace {

std::tuple<Tensor, Tensor, Tensor> topk_attention_cpu(Tensor query, Tensor key, Tensor value, int64_t top_k,
                                                      SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "topk_attention.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    SelectParams& p = s.params;
    Tensor indices = new_indices(query, p);
    Tensor out = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, value.size(3)});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse, indices};
    AttendParams a = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(a, op, indices);
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    const cpu::AttendKernel& attend = cpu::gathered_attention_kernels();
    const int64_t sharing = p.heads / p.rule.groups;
    if (sharing > 1 && !decodes(p) &&
        tiles_pay(tile_costs(), p.key_length, p.top_k, p.head_dim, a.value_dim)) {
        select_rows(s, 0, [](int64_t, int64_t, cpu::Range, char*) {});
        attend_to_indices(a);
        return {out, lse, indices};
    }
    std::vector<uint8_t> done;  // by tiles
    const bool some = attend_by_tiles(s, a, nullptr, done);
    // One task selects and attends: the block's indices and keys are still in cache.
    select_rest(s, attend.scratch_bytes(a), some ? &done : nullptr,
                [&](int64_t b, int64_t group, cpu::Range queries, char* scratch) {
                    attend.run(a, {b, {group * sharing, (group + 1) * sharing}, queries}, scratch);
                });
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("topk_attention.cpu(Tensor query, Tensor key, Tensor value, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ") -> (Tensor out, Tensor lse, Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("topk_attention.cpu", TORCH_BOX(&sparse_attn::topk_attention_cpu));
}
