// topk_attention on the CPU: selection and attention of a block of queries in one task.
#include <torch/csrc/stable/library.h>

#include <cstring>

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
    // One task selects and attends: the block's indices and keys are still in cache, and scores that ranked
    // the keys are those that weigh them.
    s.wants_logits = sharing == 1;
    select_rest(s, attend.scratch_bytes(a), some ? &done : nullptr,
                [&](int64_t b, int64_t group, cpu::Range queries, char* scratch) {
                    attend.run(a, {b, {group * sharing, (group + 1) * sharing}, queries, s.logits(scratch)},
                               scratch);
                });
    return {out, lse, indices};
}

// The same output and LSE where nobody asks for the indices: dense tiles need none, and 4·K bytes a row are
// more to write than all the rest where K is large. The selection's bits, a bit a key, where they are wanted.
std::tuple<Tensor, Tensor> attend_without_indices(const char* op, Tensor query, Tensor key, Tensor value,
                                                  int64_t top_k, uint32_t* bits,
                                                  SPARSE_ATTN_RULE_PARAMETERS) {
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    SelectParams& p = s.params;
    Tensor out = torch::stable::new_empty(query, {p.batch, p.heads, p.query_length, value.size(3)});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse};
    AttendParams a = attend_params(op, query, key, value, scale, softcap, sink_logits);
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    std::vector<uint8_t> done;
    p.indices = nullptr;
    if (!attend_by_tiles(s, a, bits, done)) {
        const auto all = topk_attention_cpu(query, key, value, top_k, SPARSE_ATTN_RULE_ARGUMENTS);
        if (bits) {
            set_indices(a, op, std::get<2>(all));
            bits_of_indices(a, bits, s.parallel);
        }
        return {std::get<0>(all), std::get<1>(all)};
    }
    // The others keep few keys or see few: their rows of indices need not be longer than that.
    int64_t most = 0;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.query_length; ++i) {
            if (done[static_cast<size_t>(b * p.query_length + i)]) continue;
            const cpu::Range keys = keys_of(p.rule, b, i, p.key_length);
            most = std::max(most, std::max<int64_t>(1, keys.end - keys.begin));
        }
    if (most == 0) return {out, lse};
    p.top_k = std::min(p.top_k, most);
    // Of this only the rows of those others are ever touched.
    const Memory indices = allocate(p.batch * p.rule.groups * p.query_length * p.top_k * 4);
    p.indices = reinterpret_cast<int32_t*>(indices.get());
    a.indices = p.indices;
    a.groups = p.rule.groups;
    a.slots = p.top_k;
    a.indices_strides = {p.rule.groups * p.query_length * p.top_k, p.query_length * p.top_k, p.top_k, 1};
    const cpu::AttendKernel& attend = cpu::gathered_attention_kernels();
    select_rest(s, attend.scratch_bytes(a), &done,
                [&](int64_t b, int64_t group, cpu::Range queries, char* scratch) {
                    attend.run(a, {b, {group, group + 1}, queries}, scratch);
                    if (bits) bits_of_rows(a, b * a.groups + group, queries, bits);
                });
    return {out, lse};
}

std::tuple<Tensor, Tensor> topk_attention_output_cpu(Tensor query, Tensor key, Tensor value, int64_t top_k,
                                                     SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "topk_attention_output.cpu";
    check_qkv(op, query, key, &value);
    return attend_without_indices(op, query, key, value, top_k, nullptr, SPARSE_ATTN_RULE_ARGUMENTS);
}

// And the selection, int32 [B, G, Tq, ⌈Tk / 32⌉]: what a gradient by tiles needs, in Tk / 8 bytes a row.
std::tuple<Tensor, Tensor, Tensor> topk_attention_bits_cpu(Tensor query, Tensor key, Tensor value,
                                                           int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "topk_attention_bits.cpu";
    check_qkv(op, query, key, &value);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS});
    const SelectParams& p = s.params;
    Tensor bits = torch::stable::new_empty(
        query, {p.batch, p.rule.groups, p.query_length, bit_words(p.key_length)}, ScalarType::Int);
    auto* words = static_cast<uint32_t*>(bits.mutable_data_ptr());
    const auto found =
        attend_without_indices(op, query, key, value, top_k, words, SPARSE_ATTN_RULE_ARGUMENTS);
    // Whatever there is to attend to writes its row whole.
    if (std::get<0>(found).numel() == 0 && bits.numel() > 0) std::memset(words, 0, bits.numel() * 4);
    return {std::get<0>(found), std::get<1>(found), bits};
}

std::tuple<Tensor, Tensor, Tensor> topk_attention_bits_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor bits,
    Tensor out, Tensor lse, double scale, double softcap, std::optional<Tensor> sink_logits) {
    const char* op = "topk_attention_bits_backward.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    bits = torch::stable::contiguous(bits);
    MaskedBackwardParams p{};
    AttendParams& f = p.forward;
    f = attend_params(op, query, key, value, scale, softcap, sink_logits);
    p.bits = bits_of(f, op, bits, f.key_length);
    const Gradients g = new_gradients(p, op, query, key, value, grad_out, grad_lse, out, lse);
    if (f.batch == 0) return g.all();
    gradients_of_bits(p);
    return g.all();
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("topk_attention.cpu(Tensor query, Tensor key, Tensor value, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ") -> (Tensor out, Tensor lse, Tensor indices)");
    m.def(
        "topk_attention_output.cpu(Tensor query, Tensor key, Tensor value, SymInt "
        "top_k, " SPARSE_ATTN_RULE_SCHEMA ") -> (Tensor out, Tensor lse)");
    m.def(
        "topk_attention_bits.cpu(Tensor query, Tensor key, Tensor value, SymInt "
        "top_k, " SPARSE_ATTN_RULE_SCHEMA ") -> (Tensor out, Tensor lse, Tensor bits)");
    m.def(
        "topk_attention_bits_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor "
        "value, Tensor bits, Tensor out, Tensor lse, float scale, float softcap, Tensor? sink_logits) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("topk_attention.cpu", TORCH_BOX(&sparse_attn::topk_attention_cpu));
    m.impl("topk_attention_output.cpu", TORCH_BOX(&sparse_attn::topk_attention_output_cpu));
    m.impl("topk_attention_bits.cpu", TORCH_BOX(&sparse_attn::topk_attention_bits_cpu));
    m.impl("topk_attention_bits_backward.cpu", TORCH_BOX(&sparse_attn::topk_attention_bits_backward_cpu));
}
