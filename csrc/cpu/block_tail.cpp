// block_tail on the CPU, forward and backward, from torch's tensors to the kernels.
#include "cpu/kernels/block_tail.h"

#include <torch/csrc/stable/library.h>

#include "cpu/masked_attention.h"

SPARSE_ATTN_FIND_KERNELS(block_tail, BlockTailKernels)

namespace sparse_attn {
namespace {

// The call's parameters, and what stands behind them.
struct BlockTail {
    BlockTailParams params{};
    Selection selection;
};

void fill(BlockTail& t, const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
          const Tensor& indices, int64_t key_length, int64_t block_size, const RuleArguments& given) {
    STD_TORCH_CHECK(
        block_size >= 32 && block_size <= 256 && (block_size & (block_size - 1)) == 0 && key_length >= 0 &&
            key_length <= std::numeric_limits<int32_t>::max() - 64 && key_length / block_size == key.size(2),
        op, ": key must hold the means of key_length / block_size blocks, of 32, 64, 128 or 256 keys; got ",
        shape_of(key), " for ", key_length, " keys in blocks of ", block_size);
    Selection& s = t.selection;
    s.params = select_params(op, query, key, 1, given);
    STD_TORCH_CHECK(s.params.rule.mask == nullptr, op, ": takes no attn_mask");
    s.lengths = lengths_of(op, given.key_lengths, s.params.batch, key_length);
    if (!s.lengths.empty()) s.params.rule.lengths = s.lengths.data();
    BlockTailParams& p = t.params;
    p.attend = attend_params(op, query, key, value, given.scale, given.softcap, std::nullopt);
    set_indices(p.attend, op, indices);
    p.select = s.params;
    p.keys = key_length;
    p.block = block_size;
}

bool worth_threads_for(const AttendParams& a) {
    return worth_threads(static_cast<double>(a.batch * a.heads) * a.query_length *
                         (a.key_length * a.head_dim + a.slots));
}

std::tuple<Tensor, Tensor> block_tail_cpu(Tensor query, Tensor key, Tensor value, Tensor indices,
                                          int64_t key_length, int64_t block_size,
                                          SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "block_tail.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    BlockTail t;
    fill(t, op, query, key, value, indices, key_length, block_size, {SPARSE_ATTN_RULE_ARGUMENTS});
    BlockTailParams& p = t.params;
    AttendParams& a = p.attend;
    Tensor out = torch::stable::new_empty(query, {a.batch, a.heads, a.query_length, a.value_dim});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse};
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    const cpu::BlockTailKernels& k = cpu::block_tail_kernels();
    const bool parallel = worth_threads_for(a);
    const int64_t step = k.block_queries(p);
    pack_keys(t.selection, step, true);
    p.packed_key = t.selection.packed.get();
    MaskedParams m{p.select, a, nullptr, nullptr, nullptr, nullptr};
    const PackedValues values = pack_values(m, parallel);
    p.packed_value = m.packed_value;
    p.special = m.special;
    const int64_t per_kv = a.heads / a.kv_heads, per_head = blocks(a.query_length, step);
    for_each_task(a.batch * a.kv_heads * per_head, k.attend.scratch_bytes(p), parallel,
                  [&](int64_t i, char* scratch) {
                      Block b = block_of(i, a.kv_heads, per_head, step, a.query_length);
                      k.attend.run(p, {b.b, {b.group * per_kv, (b.group + 1) * per_kv}, b.queries}, scratch);
                  });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_tail_backward_cpu(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                           Tensor query, Tensor key, Tensor value,
                                                           Tensor indices, Tensor out, Tensor lse,
                                                           int64_t key_length, int64_t block_size,
                                                           SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "block_tail_backward.cpu";
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    indices = with_contiguous_rows(indices);
    lse = torch::stable::contiguous(lse);
    if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
    BlockTail t;
    fill(t, op, query, key, value, indices, key_length, block_size, {SPARSE_ATTN_RULE_ARGUMENTS});
    BlockTailParams& p = t.params;
    MaskedBackwardParams g{};
    AttendParams& f = g.forward;
    f = p.attend;
    check_gradients(op, f, grad_out, grad_lse, lse);
    check_out(op, f, query, out);
    Tensor grad_query = torch::stable::new_empty(query, {f.batch, f.heads, f.query_length, f.head_dim});
    Tensor grad_key = torch::stable::new_empty(key, {f.batch, f.kv_heads, f.key_length, f.head_dim});
    Tensor grad_value = torch::stable::new_empty(value, {f.batch, f.kv_heads, f.key_length, f.value_dim});
    if (f.batch == 0) return {grad_query, grad_key, grad_value};
    f.lse = static_cast<float*>(lse.mutable_data_ptr());
    g.out = out.const_data_ptr(), g.out_strides = strides_of(out);
    g.grad_out = grad_out.const_data_ptr(), g.grad_out_strides = strides_of(grad_out);
    g.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
    g.grad_query = grad_query.mutable_data_ptr();
    g.grad_key = grad_key.mutable_data_ptr();
    g.grad_value = grad_value.mutable_data_ptr();
    const bool parallel = worth_threads_for(f);
    Memory seen, counts;
    walk_tiles(g, parallel, [&](MaskedBackwardParams& prepared) {
        const int64_t chunk = 64, chunks = blocks(prepared.rows, chunk);
        seen = allocate(f.batch * f.heads * prepared.rows * 8);
        prepared.seen = reinterpret_cast<int32_t*>(seen.get());
        prepared.count_stride = blocks(f.key_length, 96) * 96;  // whole tiles
        counts = allocate(f.batch * f.groups * f.query_length * prepared.count_stride * 2);
        prepared.counts = reinterpret_cast<uint16_t*>(counts.get());
        const cpu::BlockTailKernels& k = cpu::block_tail_kernels();
        for_each_task(f.batch * chunks, k.gradient_scratch_bytes(p), parallel, [&](int64_t i, char* scratch) {
            const int64_t first = i % chunks * chunk;
            k.prepare(p, prepared, i / chunks, {first, std::min(prepared.rows, first + chunk)}, scratch);
        });
    });
    return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "block_tail.cpu(Tensor query, Tensor key, Tensor value, Tensor indices, SymInt key_length, SymInt "
        "block_size, " SPARSE_ATTN_RULE_SCHEMA ") -> (Tensor out, Tensor lse)");
    m.def(
        "block_tail_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
        "Tensor indices, Tensor out, Tensor lse, SymInt key_length, SymInt "
        "block_size, " SPARSE_ATTN_RULE_SCHEMA
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("block_tail.cpu", TORCH_BOX(&sparse_attn::block_tail_cpu));
    m.impl("block_tail_backward.cpu", TORCH_BOX(&sparse_attn::block_tail_backward_cpu));
}
