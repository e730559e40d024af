// topk_select and its relatives on the CPU, from torch's tensors to the kernels. Arguments are validated in
// Python first, with better words; the checks here keep a direct call of an op from reading or writing out of
// bounds.
#include <torch/csrc/stable/library.h>

#include "cpu/selection.h"

namespace sparse_attn {
namespace {

Tensor select(const char* op, const Tensor& query, const Tensor& key, const std::optional<Tensor>& attn_mask,
              const std::optional<Tensor>& key_lengths, int64_t top_k, bool is_causal, int64_t causal_offset,
              double scale, int64_t window, int64_t sinks, int64_t groups, bool rounded) {
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, scale,
                      window, sinks, groups, rounded);
    SelectParams& p = s.params;
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.groups, p.query_length, p.top_k}, ScalarType::Int);
    if (indices.numel() == 0) return indices;
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    const cpu::SelectKernels& k = cpu::topk_select_kernels();
    pack_keys(s, k.block_queries(p));
    for_each_task(p.batch * p.groups * s.per_head, k.select.scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, p.groups, s.per_head, s.block, p.query_length);
                      k.select.run(p, {t.b, t.group, t.queries, s.packed.get()}, scratch);
                  });
    return indices;
}

Tensor topk_select_cpu(Tensor query, Tensor key, std::optional<Tensor> attn_mask,
                       std::optional<Tensor> key_lengths, int64_t top_k, bool is_causal,
                       int64_t causal_offset, double scale, int64_t window, int64_t sinks, int64_t groups) {
    return select("topk_select.cpu", query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset,
                  scale, window, sinks, groups, false);
}

Tensor quantized_select_cpu(Tensor query, Tensor key, std::optional<Tensor> attn_mask,
                            std::optional<Tensor> key_lengths, int64_t top_k, bool is_causal,
                            int64_t causal_offset, double scale, int64_t window, int64_t sinks,
                            int64_t groups) {
    return select("quantized_select.cpu", query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset,
                  scale, window, sinks, groups, true);
}

Tensor refine_blocks_cpu(Tensor query, Tensor key, Tensor blocks_of, std::optional<Tensor> key_lengths,
                         int64_t top_k, int64_t block_size, int64_t query_tile, bool is_causal,
                         int64_t causal_offset, double scale, int64_t window, int64_t sinks, int64_t groups) {
    const char* op = "refine_blocks.cpu";
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, std::nullopt, key_lengths, top_k, is_causal, causal_offset, scale,
                      window, sinks, groups);
    SelectParams& p = s.params;
    STD_TORCH_CHECK(block_size >= 1 && query_tile >= 1, op,
                    ": block_size and query_tile must be at least 1; got ", block_size, " and ", query_tile);
    // Longer ones change nothing, and sums of them still fit.
    p.block_size = std::min(block_size, std::max<int64_t>(1, p.key_length));
    p.query_tile = std::min(query_tile, std::max<int64_t>(1, p.query_length));
    const int64_t tiles = blocks(p.query_length, p.query_tile);
    STD_TORCH_CHECK(blocks_of.scalar_type() == ScalarType::Int && blocks_of.dim() == 4 &&
                        blocks_of.size(0) == p.batch && blocks_of.size(1) == groups &&
                        blocks_of.size(2) == tiles,
                    op, ": blocks must be int32 [B, G, N, M], N tiles of queries; got ", shape_of(blocks_of));
    blocks_of = with_contiguous_rows(blocks_of);
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.groups, p.query_length, p.top_k}, ScalarType::Int);
    if (indices.numel() == 0) return indices;
    static constexpr int32_t kNone = -1;
    p.block_slots = blocks_of.size(3);
    p.blocks = p.block_slots ? static_cast<const int32_t*>(blocks_of.const_data_ptr()) : &kNone;
    p.blocks_strides = strides_of(blocks_of);
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    const cpu::SelectKernels& k = cpu::topk_select_kernels();
    const int64_t step = k.block_queries(p), parts = blocks(p.query_tile, step);
    pack_keys(s, step);
    for_each_task(p.batch * groups * tiles * parts, k.select.scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      const int64_t head = i / (tiles * parts), n = i / parts % tiles;
                      const int64_t begin = n * p.query_tile + i % parts * step;
                      const int64_t end = std::min({begin + step, (n + 1) * p.query_tile, p.query_length});
                      if (begin < end)
                          k.select.run(p, {head / groups, head % groups, {begin, end}, s.packed.get()},
                                       scratch);
                  });
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "topk_select.cpu(Tensor query, Tensor key, Tensor? attn_mask, Tensor? key_lengths, SymInt top_k, "
        "bool is_causal, SymInt causal_offset, "
        "float scale, SymInt window, SymInt sinks, SymInt groups) -> Tensor");
    m.def(
        "quantized_select.cpu(Tensor query, Tensor key, Tensor? attn_mask, Tensor? key_lengths, SymInt "
        "top_k, bool is_causal, SymInt causal_offset, "
        "float scale, SymInt window, SymInt sinks, SymInt groups) -> Tensor");
    m.def(
        "refine_blocks.cpu(Tensor query, Tensor key, Tensor blocks, Tensor? key_lengths, SymInt top_k, "
        "SymInt block_size, SymInt query_tile, bool is_causal, SymInt causal_offset, float scale, "
        "SymInt window, SymInt sinks, SymInt groups) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("topk_select.cpu", TORCH_BOX(&sparse_attn::topk_select_cpu));
    m.impl("quantized_select.cpu", TORCH_BOX(&sparse_attn::quantized_select_cpu));
    m.impl("refine_blocks.cpu", TORCH_BOX(&sparse_attn::refine_blocks_cpu));
}
