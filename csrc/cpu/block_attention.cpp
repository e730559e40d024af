// block_attention on the CPU, forward and backward, from torch's tensors to the kernels.
#include "cpu/kernels/block_attention.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/selection.h"

SPARSE_ATTN_FIND_KERNELS(block_attention, BlockKernels)
SPARSE_ATTN_FIND_KERNELS(block_attention_backward, BlockBackwardKernels)

namespace sparse_attn {
namespace {

// All but the results and the packed keys; `blocks_of` and `lengths` must outlive them.
BlockParams block_params(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                         Tensor& blocks_of, int64_t block_size, int64_t query_tile,
                         const std::vector<int64_t>& lengths, const RuleArguments& given) {
    STD_TORCH_CHECK(block_size >= 1 && query_tile >= 1, op,
                    ": block_size and query_tile must be at least 1; got ", block_size, " and ", query_tile);
    BlockParams p{};
    AttendParams& a = p.attend;
    a = attend_params(op, query, key, value, given.scale, given.softcap, given.sink_logits);
    // Longer ones change nothing, and sums of them still fit.
    p.block_size = std::min(block_size, std::max<int64_t>(1, a.key_length));
    p.query_tile = std::min(query_tile, std::max<int64_t>(1, a.query_length));
    p.tiles = blocks(a.query_length, p.query_tile);
    p.block_count = blocks(a.key_length, p.block_size);
    p.chunks_per_block = blocks(p.block_size, kBlockChunk);
    p.rule = rule_of(op, query, key, given);
    STD_TORCH_CHECK(!p.rule.mask && p.rule.kept() == 0, op,
                    ": takes no attn_mask, and no keys that are always kept; got ",
                    numbers_of(given.numbers));
    const int64_t groups = p.rule.groups;
    STD_TORCH_CHECK(blocks_of.scalar_type() == ScalarType::Int && blocks_of.dim() == 4 &&
                        blocks_of.size(0) == a.batch && blocks_of.size(1) == groups &&
                        blocks_of.size(2) == p.tiles,
                    op, ": blocks must be int32 [B, G, N, M], G the rule's groups, N tiles of queries; got ",
                    shape_of(blocks_of), " with groups=", groups);
    blocks_of = with_contiguous_rows(blocks_of);
    a.indices = static_cast<const int32_t*>(blocks_of.const_data_ptr());
    a.indices_strides = strides_of(blocks_of);
    a.groups = groups;
    a.slots = blocks_of.size(3);
    p.rule.lengths = lengths.empty() ? nullptr : lengths.data();
    return p;
}

bool block_worth_threads(const BlockParams& p) {
    const AttendParams& a = p.attend;
    const double pairs = static_cast<double>(a.batch * a.heads) * a.query_length * a.slots * p.block_size;
    return worth_threads(pairs * (a.head_dim + a.value_dim));
}

// Calls run({b, heads, tile}, scratch) for each tile of the heads that share a key head and a row of blocks:
// they are rows of one product. The last tiles first: with a causal limit they have the most to do.
template <class F>
void for_each_tile(const BlockParams& p, int64_t scratch_bytes, bool parallel, const F& run) {
    const AttendParams& a = p.attend;
    const int64_t units = std::max(a.kv_heads, a.groups), sharing = a.heads / units;
    for_each_task(a.batch * units * p.tiles, scratch_bytes, parallel, [&](int64_t i, char* scratch) {
        const int64_t unit = i / p.tiles % units;
        run(
            cpu::TileTask{
                i / p.tiles / units, {unit * sharing, (unit + 1) * sharing}, p.tiles - 1 - i % p.tiles},
            scratch);
    });
}

// For each (b, g, block) the tiles that chose it, ascending; one that is named twice stands there twice.
struct TilesOf {
    std::vector<int64_t> starts;
    std::vector<int32_t> tiles;
};
TilesOf tiles_of_blocks(const BlockParams& p) {
    const AttendParams& a = p.attend;
    TilesOf result;
    result.starts.assign(a.batch * a.groups * p.block_count + 1, 0);
    auto visit = [&](auto&& with) {
        for (int64_t list = 0; list < a.batch * a.groups; ++list)
            for (int64_t t = 0; t < p.tiles; ++t) {
                const Strides& s = a.indices_strides;
                const int32_t* row = a.indices + list / a.groups * s.b + list % a.groups * s.h + t * s.t;
                for (int64_t m = 0; m < a.slots; ++m)
                    if (row[m] >= 0 && row[m] < p.block_count) with(list * p.block_count + row[m], t);
            }
    };
    visit([&](int64_t i, int64_t) { ++result.starts[i + 1]; });
    for (size_t i = 1; i < result.starts.size(); ++i) result.starts[i] += result.starts[i - 1];
    result.tiles.resize(result.starts.back());
    std::vector<int64_t> next = result.starts;
    visit([&](int64_t i, int64_t t) { result.tiles[next[i]++] = static_cast<int32_t>(t); });
    return result;
}

std::tuple<Tensor, Tensor> block_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor blocks_of,
                                               int64_t block_size, int64_t query_tile,
                                               SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "block_attention.cpu";
    check_qkv(op, query, key, &value);
    const std::vector<int64_t> lengths = lengths_of(op, key_lengths, query.size(0), key.size(2));
    BlockParams p = block_params(op, query, key, value, blocks_of, block_size, query_tile, lengths,
                                 {SPARSE_ATTN_RULE_ARGUMENTS});
    AttendParams& a = p.attend;
    Tensor out = torch::stable::new_empty(query, {a.batch, a.heads, a.query_length, a.value_dim});
    Tensor lse = new_lse(query);
    if (out.numel() == 0) return {out, lse};
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());

    const cpu::BlockKernels& k = cpu::block_attention_kernels();
    const int64_t chunks = p.block_count * p.chunks_per_block, key_heads = a.batch * a.kv_heads;
    Memory packed_key = allocate(key_heads * chunks * k.packed_key(p) * 4);
    Memory packed_value = allocate(key_heads * chunks * k.packed_value(p) * 4);
    Memory special = allocate(key_heads * chunks);
    p.packed_key = reinterpret_cast<float*>(packed_key.get());
    p.packed_value = reinterpret_cast<float*>(packed_value.get());
    p.special = reinterpret_cast<uint8_t*>(special.get());
    const bool parallel = block_worth_threads(p);
    constexpr int64_t kPack = 16;
    const int64_t packs = blocks(chunks, kPack);
    for_each_task(key_heads * packs, 64, parallel, [&](int64_t i, char*) {
        const int64_t head = i / packs, c = i % packs * kPack;
        k.pack(p, head / a.kv_heads, head % a.kv_heads, {c, std::min(chunks, c + kPack)});
    });
    for_each_tile(p, k.attend.scratch_bytes(p), parallel,
                  [&](cpu::TileTask task, char* scratch) { k.attend.run(p, task, scratch); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor blocks_of,
    Tensor out /* checked alone: ΣP∘dO·Vᵀ is summed from values that nobody rounded */, Tensor lse,
    int64_t block_size, int64_t query_tile, SPARSE_ATTN_RULE_PARAMETERS) {
    const char* op = "block_attention_backward.cpu";
    check_qkv(op, query, key, &value);
    lse = torch::stable::contiguous(lse);
    if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
    const std::vector<int64_t> lengths = lengths_of(op, key_lengths, query.size(0), key.size(2));
    BlockBackwardParams p{};
    BlockParams& f = p.forward;
    f = block_params(op, query, key, value, blocks_of, block_size, query_tile, lengths,
                     {SPARSE_ATTN_RULE_ARGUMENTS});
    AttendParams& a = f.attend;
    check_gradients(op, a, grad_out, grad_lse, lse);
    check_out(op, a, query, out);
    Tensor grad_query = torch::stable::new_empty(query, {a.batch, a.heads, a.query_length, a.head_dim});
    Tensor grad_key = torch::stable::new_empty(key, {a.batch, a.kv_heads, a.key_length, a.head_dim});
    Tensor grad_value = torch::stable::new_empty(value, {a.batch, a.kv_heads, a.key_length, a.value_dim});
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.grad_out = grad_out.const_data_ptr();
    p.grad_out_strides = strides_of(grad_out);
    p.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
    p.grad_query = grad_query.mutable_data_ptr();
    p.grad_key = grad_key.mutable_data_ptr();
    p.grad_value = grad_value.mutable_data_ptr();
    Memory centre = allocate(a.batch * a.heads * a.query_length * 4);
    p.centre = reinterpret_cast<float*>(centre.get());
    const TilesOf chosen = tiles_of_blocks(f);
    p.starts = chosen.starts.data();
    p.tiles_of = chosen.tiles.data();

    const cpu::BlockBackwardKernels& k = cpu::block_attention_backward_kernels();
    const bool parallel = block_worth_threads(f);
    for_each_tile(f, k.query.scratch_bytes(p), parallel,
                  [&](cpu::TileTask task, char* scratch) { k.query.run(p, task, scratch); });
    // The first blocks of all heads first: every tile chooses them.
    const int64_t key_heads = a.batch * a.kv_heads;
    for_each_task(key_heads * f.block_count * f.chunks_per_block, k.key_scratch_bytes(p), parallel,
                  [&](int64_t i, char* scratch) {
                      const int64_t head = i % key_heads;
                      k.key(p, head / a.kv_heads, head % a.kv_heads, i / key_heads, scratch);
                  });
    return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "block_attention.cpu(Tensor query, Tensor key, Tensor value, Tensor blocks, SymInt block_size, "
        "SymInt query_tile, " SPARSE_ATTN_RULE_SCHEMA ") -> (Tensor out, Tensor lse)");
    m.def(
        "block_attention_backward.cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor "
        "value, Tensor blocks, Tensor out, Tensor lse, SymInt block_size, SymInt "
        "query_tile, " SPARSE_ATTN_RULE_SCHEMA
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("block_attention.cpu", TORCH_BOX(&sparse_attn::block_attention_cpu));
    m.impl("block_attention_backward.cpu", TORCH_BOX(&sparse_attn::block_attention_backward_cpu));
}
