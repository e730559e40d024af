// block_tail on the CPU, forward and backward, from torch's tensors to the kernels.
#include "cpu/kernels/block_tail.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

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
          const Tensor& selection, bool as_bits, int64_t key_length, int64_t block_size,
          const RuleArguments& given) {
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
    if (as_bits)
        p.bits = bits_of(p.attend, op, selection, key_length);
    else
        set_indices(p.attend, op, selection);
    p.select = s.params;
    p.keys = key_length;
    p.block = block_size;
}

bool worth_threads_for(const AttendParams& a) {
    return worth_threads(static_cast<double>(a.batch * a.heads) * a.query_length *
                         (a.key_length * a.head_dim + a.slots));
}

std::tuple<Tensor, Tensor> attend_to_blocks(const char* op, const Tensor& query, Tensor key, Tensor value,
                                            const Tensor& selection, bool as_bits, int64_t key_length,
                                            int64_t block_size, const RuleArguments& given) {
    check_qkv(op, query, key, &value);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    const Tensor rows = as_bits ? torch::stable::contiguous(selection) : with_contiguous_rows(selection);
    BlockTail t;
    fill(t, op, query, key, value, rows, as_bits, key_length, block_size, given);
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

std::tuple<Tensor, Tensor> block_tail_cpu(Tensor query, Tensor key, Tensor value, Tensor indices,
                                          int64_t key_length, int64_t block_size,
                                          SPARSE_ATTN_RULE_PARAMETERS) {
    return attend_to_blocks("block_tail.cpu", query, key, value, indices, false, key_length, block_size,
                            {SPARSE_ATTN_RULE_ARGUMENTS});
}

// The gradients that stand in g.
void walk_blocks(MaskedBackwardParams& g, const BlockTailParams& p) {
    const AttendParams& f = g.forward;
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
    BlockTail t;
    fill(t, op, query, key, value, indices, false, key_length, block_size, {SPARSE_ATTN_RULE_ARGUMENTS});
    BlockTailParams& p = t.params;
    MaskedBackwardParams g{};
    AttendParams& f = g.forward;
    f = p.attend;
    const Gradients made = new_gradients(g, op, query, key, value, grad_out, grad_lse, out, lse);
    if (f.batch == 0) return made.all();
    walk_blocks(g, p);
    return made.all();
}

// ---- with the selection, in one op: float32

// out, lse: of the blocks alone; then of both, with what the selection gives.
void join(const Tensor& out, const Tensor& lse, const Tensor& own_out, const Tensor& own_lse) {
    auto *to = static_cast<float*>(out.mutable_data_ptr()),
         *total = static_cast<float*>(lse.mutable_data_ptr());
    const auto* from = static_cast<const float*>(own_out.const_data_ptr());
    const auto* before = static_cast<const float*>(own_lse.const_data_ptr());
    const int64_t rows = lse.numel(), width = out.size(3), chunk = 256;
    for_each_task(blocks(rows, chunk), 64, worth_threads(4.0 * static_cast<double>(rows * width)),
                  [&](int64_t n, char*) {
                      for (int64_t i = n * chunk; i < std::min(rows, (n + 1) * chunk); ++i) {
                          const float own = before[i], more = total[i];
                          if (more == -std::numeric_limits<float>::infinity()) {  // nothing is left out
                              std::copy_n(from + i * width, width, to + i * width);
                              total[i] = own;
                              continue;
                          }
                          const float share = 1.0f / (1.0f + std::exp(own - more));
                          for (int64_t d = i * width; d < (i + 1) * width; ++d)
                              to[d] = from[d] + share * (to[d] - from[d]);
                          total[i] = std::max(own, more) + std::log1p(std::exp(-std::fabs(own - more)));
                      }
                  });
}

std::tuple<Tensor, Tensor> attention_with_blocks_cpu(Tensor query, Tensor key, Tensor value, Tensor key_means,
                                                     Tensor value_means, Tensor selection, bool as_bits,
                                                     Tensor own_out, Tensor own_lse, int64_t key_length,
                                                     int64_t block_size, SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "attention_with_blocks.cpu";
    check_qkv(op, query, key, &value);
    const auto both = attend_to_blocks(op, query, key_means, value_means, selection, as_bits, key_length,
                                       block_size, {SPARSE_ATTN_RULE_ARGUMENTS});
    const auto& [out, lse] = both;
    STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float, op,
                    ": query must be float32, as all the others");
    const auto like = [](const Tensor& one, const Tensor& other) {
        bool same = one.dim() == other.dim() && one.scalar_type() == ScalarType::Float;
        for (int64_t d = 0; same && d < other.dim(); ++d) same = one.size(d) == other.size(d);
        return same;
    };
    STD_TORCH_CHECK(like(own_out, out), op, ": own_out must be float32 ", shape_of(out), "; got ",
                    shape_of(own_out));
    STD_TORCH_CHECK(like(own_lse, lse), op, ": own_lse must be float32 ", shape_of(lse), "; got ",
                    shape_of(own_lse));
    join(out, lse, torch::stable::contiguous(own_out), torch::stable::contiguous(own_lse));
    return both;
}

// rows [B, H, T, C] += means [B, H, T / block, C] / block, of whole blocks.
void add_means(const Tensor& rows, const Tensor& means, int64_t block) {
    auto* to = static_cast<float*>(rows.mutable_data_ptr());
    const auto* from = static_cast<const float*>(means.const_data_ptr());
    const int64_t length = rows.size(2), count = means.size(2), width = rows.size(3),
                  heads = rows.size(0) * rows.size(1);
    const float share = 1.0f / static_cast<float>(block);
    for_each_task(heads * count, 64, worth_threads(2.0 * static_cast<double>(heads * length * width)),
                  [&](int64_t i, char*) {
                      const float* mean = from + i * width;
                      float* row = to + (i / count * length + i % count * block) * width;
                      for (int64_t j = 0; j < block; ++j, row += width)
                          for (int64_t d = 0; d < width; ++d) row[d] += mean[d] * share;
                  });
}

// One softmax over the chosen keys and the blocks: each part's gradients by the output and LSE of both.
std::tuple<Tensor, Tensor, Tensor> attention_with_blocks_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor key_means,
    Tensor value_means, Tensor selection, bool as_bits, Tensor out, Tensor lse, int64_t key_length,
    int64_t block_size, SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "attention_with_blocks_backward.cpu";
    check_qkv(op, query, key, &value);
    check_qkv(op, query, key_means, &value_means);
    STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float && key.size(2) == key_length, op,
                    ": takes float32 and all key_length keys; got ", shape_of(key), " for ", key_length);
    STD_TORCH_CHECK(key_means.size(1) == key.size(1), op, ": key_means must have the heads of key; got ",
                    shape_of(key_means));
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    key_means = with_contiguous_rows(key_means);
    value_means = with_contiguous_rows(value_means);
    selection = as_bits ? torch::stable::contiguous(selection) : with_contiguous_rows(selection);
    MaskedBackwardParams m{};
    AttendParams& f = m.forward;
    f = attend_params(op, query, key, value, scale, softcap, sink_logits);
    if (as_bits)
        m.bits = bits_of(f, op, selection, key_length);
    else
        set_indices(f, op, selection);
    const Gradients own = new_gradients(m, op, query, key, value, grad_out, grad_lse, out, lse);
    if (f.batch == 0) return own.all();
    if (as_bits)
        gradients_of_bits(m);
    else
        gradients_of_indices(m, true);
    BlockTail t;
    fill(t, op, query, key_means, value_means, selection, as_bits, key_length, block_size,
         {SPARSE_ATTN_RULE_ARGUMENTS});
    MaskedBackwardParams g{};
    g.forward = t.params.attend;
    const Gradients rest = new_gradients(g, op, query, key_means, value_means, grad_out, grad_lse, out, lse);
    if (key_means.size(2) == 0) return own.all();
    g.grad_query = m.grad_query, g.adds = true;
    walk_blocks(g, t.params);
    add_means(own.key, rest.key, block_size);
    add_means(own.value, rest.value, block_size);
    return own.all();
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "attention_with_blocks.cpu(Tensor query, Tensor key, Tensor value, Tensor key_means, Tensor "
        "value_means, Tensor selection, bool as_bits, Tensor own_out, Tensor own_lse, SymInt key_length, "
        "SymInt block_size, " SPARSE_ATTN_RULE_SCHEMA ") -> (Tensor out, Tensor lse)");
    m.def(
        "attention_with_blocks_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
        "Tensor value, Tensor key_means, Tensor value_means, Tensor selection, bool as_bits, Tensor out, "
        "Tensor lse, SymInt key_length, SymInt block_size, " SPARSE_ATTN_RULE_SCHEMA
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
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
    m.impl("attention_with_blocks.cpu", TORCH_BOX(&sparse_attn::attention_with_blocks_cpu));
    m.impl("attention_with_blocks_backward.cpu", TORCH_BOX(&sparse_attn::attention_with_blocks_backward_cpu));
    m.impl("block_tail.cpu", TORCH_BOX(&sparse_attn::block_tail_cpu));
    m.impl("block_tail_backward.cpu", TORCH_BOX(&sparse_attn::block_tail_backward_cpu));
}
