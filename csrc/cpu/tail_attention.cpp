// tail_attention on the CPU, forward and backward, from torch's tensors to the kernels.
#include "cpu/kernels/tail_attention.h"

#include <torch/csrc/stable/library.h>

#include "cpu/masked_attention.h"

SPARSE_ATTN_FIND_KERNELS(tail_attention, TailKernels)

namespace sparse_attn {
namespace {

// The call's parameters, and what stands behind them.
struct Tail {
    TailParams params{};
    Selection selection;
    Memory prefix, special;
    PackedValues values;
};

void fill(Tail& t, const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
          const Tensor& indices, const RuleArguments& given) {
    prepare_selection(t.selection, op, query, key, 1, given);
    const SelectParams& s = t.selection.params;
    STD_TORCH_CHECK(s.rule.mask == nullptr, op,
                    ": takes no attn_mask, what a query sees must be keys in a row");
    TailParams& p = t.params;
    p.attend = attend_params(op, query, key, value, given.scale, given.softcap, given.sink_logits);
    set_indices(p.attend, op, indices);
    p.select = s;
}

bool worth_threads_for(const TailParams& p) {
    const AttendParams& a = p.attend;
    return worth_threads(static_cast<double>(a.batch * a.heads) * a.query_length * a.key_length * a.head_dim);
}

void sum_values(Tail& t, bool parallel) {
    TailParams& p = t.params;
    const AttendParams& a = p.attend;
    const cpu::TailKernels& k = cpu::tail_attention_kernels();
    const int64_t heads = a.batch * a.kv_heads;
    t.prefix = allocate(heads * (a.key_length + 1) * a.value_dim * 8);
    t.special = allocate(heads);
    p.prefix = reinterpret_cast<const double*>(t.prefix.get());
    p.special = reinterpret_cast<const uint8_t*>(t.special.get());
    for_each_task(heads, 64, parallel,
                  [&](int64_t i, char*) { k.sum_values(p, i / a.kv_heads, i % a.kv_heads); });
}

std::tuple<Tensor, Tensor, Tensor> tail_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor indices,
                                                      SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "tail_attention.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    Tail t;
    fill(t, op, query, key, value, indices, {SPARSE_ATTN_RULE_ARGUMENTS});
    TailParams& p = t.params;
    AttendParams& a = p.attend;
    Tensor out = torch::stable::new_empty(query, {a.batch, a.heads, a.query_length, a.value_dim});
    Tensor lse = new_lse(query), outside = new_lse(query);
    if (out.numel() == 0) return {out, lse, outside};
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.outside = static_cast<float*>(outside.mutable_data_ptr());
    const bool parallel = worth_threads_for(p);
    sum_values(t, parallel);
    const cpu::TailKernels& k = cpu::tail_attention_kernels();
    const int64_t step = k.block_queries(p);
    pack_keys(t.selection, step, true);
    p.packed_key = t.selection.packed.get();
    // Rows of tiles cost what a quarter as many gathered ones do, and half of the keys are seen, if causal.
    const int64_t seen = p.select.rule.is_causal ? a.key_length / 2 : a.key_length;
    if (4 * a.slots >= seen) {
        MaskedParams m{p.select, a, nullptr, nullptr, nullptr, nullptr};
        t.values = pack_values(m, parallel);
        p.packed_value = m.packed_value;
    }
    const int64_t per_kv = a.heads / a.kv_heads, per_head = blocks(a.query_length, step);
    for_each_task(a.batch * a.kv_heads * per_head, k.attend.scratch_bytes(p), parallel,
                  [&](int64_t i, char* scratch) {
                      Block b = block_of(i, a.kv_heads, per_head, step, a.query_length);
                      k.attend.run(p, {b.b, {b.group * per_kv, (b.group + 1) * per_kv}, b.queries}, scratch);
                  });
    return {out, lse, outside};
}

std::tuple<Tensor, Tensor, Tensor> tail_attention_backward_cpu(Tensor grad_out,
                                                               std::optional<Tensor> grad_lse, Tensor query,
                                                               Tensor key, Tensor value, Tensor indices,
                                                               Tensor out, Tensor lse, Tensor outside,
                                                               SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "tail_attention_backward.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    outside = torch::stable::contiguous(outside);
    Tail t;
    fill(t, op, query, key, value, indices, {SPARSE_ATTN_RULE_ARGUMENTS});
    TailParams& p = t.params;
    MaskedBackwardParams g{};
    AttendParams& f = g.forward;
    f = p.attend;
    const Gradients made = new_gradients(g, op, query, key, value, grad_out, grad_lse, out, lse);
    STD_TORCH_CHECK(outside.numel() == lse.numel() && outside.scalar_type() == ScalarType::Float, op,
                    ": outside must be float32 [B, Hq, Tq]; got ", shape_of(outside));
    if (f.batch == 0) return made.all();
    p.outside = static_cast<float*>(outside.mutable_data_ptr());
    const bool parallel = worth_threads_for(p);
    sum_values(t, parallel);
    Memory bits = allocate(f.batch * f.groups * f.query_length * bit_words(f.key_length) * 4);
    bits_of_indices(f, reinterpret_cast<uint32_t*>(bits.get()), parallel);
    g.bits = reinterpret_cast<const uint32_t*>(bits.get());
    Memory rows;
    walk_tiles(g, parallel, [&](MaskedBackwardParams& prepared) {
        const int64_t heads = f.batch * f.heads, count = heads * prepared.rows, chunk = 64,
                      chunks = blocks(prepared.rows, chunk);
        rows = allocate(count * 16);
        prepared.tail = reinterpret_cast<float*>(rows.get());
        prepared.share = prepared.tail + count;
        prepared.seen = reinterpret_cast<int32_t*>(prepared.share + count);
        const cpu::TailKernels& k = cpu::tail_attention_kernels();
        for_each_task(heads * chunks, k.gradient_scratch_bytes(p), parallel, [&](int64_t i, char* scratch) {
            const int64_t head = i / chunks % f.heads, first = i % chunks * chunk;
            const cpu::Range queries{first, std::min(prepared.rows, first + chunk)};
            k.prepare(p, prepared, {i / chunks / f.heads, {head, head + 1}, queries}, scratch);
        });
    });
    return made.all();
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "tail_attention.cpu(Tensor query, Tensor key, Tensor value, Tensor indices, " SPARSE_ATTN_RULE_SCHEMA
        ") -> (Tensor out, Tensor lse, Tensor outside)");
    m.def(
        "tail_attention_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
        "value, Tensor indices, Tensor out, Tensor lse, Tensor outside, " SPARSE_ATTN_RULE_SCHEMA
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("tail_attention.cpu", TORCH_BOX(&sparse_attn::tail_attention_cpu));
    m.impl("tail_attention_backward.cpu", TORCH_BOX(&sparse_attn::tail_attention_backward_cpu));
}
