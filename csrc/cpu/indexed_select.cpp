// indexed_select and indexed_attention on the CPU: topk_select's selection, found through 8-bit rows of the
// keys.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/gathered_attention.h"
#include "cpu/topk_decode.h"

SPARSE_ATTN_FIND_KERNELS(gathered_attention, AttendKernel)

namespace sparse_attn {
namespace {

KeyIndexParams index_of(const char* op, const Tensor& key, const Tensor& codes, const Tensor& bounds,
                        const Tensor& shift) {
    const int64_t n = codes.dim() == 6 ? codes.size(2) : 0;
    STD_TORCH_CHECK(n * cpu::kIndexKeys >= key.size(2), op, ": the index must be of at least the keys ",
                    shape_of(key), "; got ", shape_of(codes));
    return key_index_of(op, key.size(0), key.size(1), n, key.size(3), codes, bounds, shift,
                        {key.size(0), key.size(1), key.size(3)});
}

Tensor indexed_select_cpu(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, Tensor codes,
                          Tensor bounds, Tensor shift) {
    const char* op = "indexed_select.cpu";
    check_qkv(op, query, key, nullptr);
    key = with_contiguous_rows(key);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    const KeyIndexParams index = index_of(op, key, codes, bounds, shift);
    Tensor indices = new_indices(query, s.params);
    if (indices.numel() > 0) decode(s.params, 0, [](int64_t, int64_t, int64_t, char*) {}, index);
    return indices;
}

std::tuple<Tensor, Tensor, Tensor> indexed_attention_cpu(Tensor query, Tensor key, Tensor value,
                                                         int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS,
                                                         Tensor codes, Tensor bounds, Tensor shift) {
    const char* op = "indexed_attention.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    const SelectParams& p = s.params;
    const KeyIndexParams index = index_of(op, key, codes, bounds, shift);
    Tensor indices = new_indices(query, s.params);
    Tensor out = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, value.size(3)});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse, indices};
    AttendParams a = attend_params(op, query, key, value, scale, softcap, sink_logits);
    set_indices(a, op, indices);
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    const cpu::AttendKernel& attend = cpu::gathered_attention_kernels();
    const int64_t sharing = p.heads / p.rule.groups;
    // Whoever chose a row attends to its keys, which are in cache.
    decode(
        p, attend.scratch_bytes(a),
        [&](int64_t b, int64_t group, int64_t i, char* scratch) {
            attend.run(a, {b, {group * sharing, (group + 1) * sharing}, {i, i + 1}}, scratch);
        },
        index);
    return {out, lse, indices};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("indexed_select.cpu(Tensor query, Tensor key, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ", Tensor codes, Tensor bounds, Tensor shift) -> Tensor");
    m.def(
        "indexed_attention.cpu(Tensor query, Tensor key, Tensor value, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
        ", Tensor codes, Tensor bounds, Tensor shift) -> (Tensor out, Tensor lse, Tensor indices)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("indexed_select.cpu", TORCH_BOX(&sparse_attn::indexed_select_cpu));
    m.impl("indexed_attention.cpu", TORCH_BOX(&sparse_attn::indexed_attention_cpu));
}
