// The ops that select, from torch's tensors to the CPU kernels. Arguments are validated in Python first, with
// better words; the checks here keep a direct call of an op from reading or writing out of bounds.
#include "cpu_selection.h"

#include "cpu_attention.h"
#include "cpu_dispatch.h"

namespace sparse_attn {

using cpu::KernelTable;

std::vector<int64_t> lengths_of(const char* op, const std::optional<Tensor>& key_lengths, int64_t batch,
                                int64_t key_length) {
    std::vector<int64_t> lengths;
    if (!key_lengths) return lengths;
    const Tensor& n = *key_lengths;
    check_key_lengths(op, n, batch);
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = b * n.stride(0);
        const int64_t length = n.scalar_type() == ScalarType::Int
                                   ? static_cast<const int32_t*>(n.const_data_ptr())[at]
                                   : static_cast<const int64_t*>(n.const_data_ptr())[at];
        lengths.push_back(std::clamp<int64_t>(length, 0, key_length));
    }
    return lengths;
}

void prepare_selection(Selection& s, const char* op, const Tensor& query, const Tensor& key,
                       const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& key_lengths,
                       int64_t top_k, bool is_causal, int64_t causal_offset, double scale, int64_t window,
                       int64_t sinks, int64_t groups, bool rounded) {
    s.params = select_params(op, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, scale,
                             window, sinks, groups);
    s.params.rounded = rounded;
    s.lengths = lengths_of(op, key_lengths, s.params.batch, s.params.key_length);
    if (!s.lengths.empty()) s.params.lengths = s.lengths.data();
}

// Whether any query can see more keys than it may keep: if none can, no score is needed.
bool needs_scores(const SelectParams& p) {
    int64_t most = p.key_length;
    if (p.is_causal) most = std::min(most, p.query_length + p.causal_offset);
    return most > p.top_k || p.mask != nullptr || p.blocks != nullptr;
}

void pack_keys(Selection& s, int64_t block) {
    const SelectParams& p = s.params;
    const KernelTable& k = cpu::kernels();
    s.block = block;
    s.per_head = blocks(p.query_length, s.block);
    double pairs = static_cast<double>(p.batch * p.heads) * p.query_length * p.key_length;
    s.parallel = worth_threads(pairs * p.head_dim);
    if (!needs_scores(p)) return;
    const int64_t head_bytes = k.packed_head_bytes(p), panels = k.panel_count(p), chunk = 64;
    s.packed = allocate(head_bytes * p.batch * p.kv_heads);
    const int64_t chunks = blocks(panels, chunk);
    for_each_task(p.batch * p.kv_heads * chunks, 64, s.parallel, [&](int64_t i, char*) {
        int64_t head = i / chunks, c = i % chunks;
        k.pack_keys(p, head / p.kv_heads, head % p.kv_heads, {c * chunk, std::min(panels, (c + 1) * chunk)},
                    s.packed.get() + head * head_bytes);
    });
}

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
    const KernelTable& k = cpu::kernels();
    pack_keys(s, k.select_block_queries(p));
    for_each_task(p.batch * p.groups * s.per_head, k.select_scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, p.groups, s.per_head, s.block, p.query_length);
                      k.select(p, t.b, t.group, t.queries, s.packed.get(), scratch);
                  });
    return indices;
}

}  // namespace

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

Tensor indexer_select_cpu(Tensor query, Tensor key, Tensor weights, std::optional<Tensor> attn_mask,
                          std::optional<Tensor> key_lengths, int64_t top_k, bool is_causal,
                          int64_t causal_offset, int64_t window, int64_t sinks, bool int8) {
    const char* op = "indexer_select.cpu";
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, 1.0, window,
                      sinks, key.size(1), int8);
    STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.dim() == 3 &&
                        weights.size(0) == query.size(0) && weights.size(1) == query.size(1) &&
                        weights.size(2) == query.size(2),
                    op, ": weights must be float32 [B, G·Hi, Tq]; got ", shape_of(weights));
    SelectParams& p = s.params;
    Tensor indices =
        torch::stable::new_empty(query, {p.batch, p.groups, p.query_length, p.top_k}, ScalarType::Int);
    if (indices.numel() == 0) return indices;
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    const KernelTable& k = cpu::kernels();
    pack_keys(s, k.indexer_block_queries());
    const IndexerParams indexer{p, static_cast<const float*>(weights.const_data_ptr()), weights.stride(0),
                                weights.stride(1), weights.stride(2)};
    for_each_task(p.batch * p.groups * s.per_head, k.indexer_scratch_bytes(indexer), s.parallel,
                  [&](int64_t i, char* scratch) {
                      Block t = block_of(i, p.groups, s.per_head, s.block, p.query_length);
                      k.indexer_select(indexer, t.b, t.group, t.queries, s.packed.get(), scratch);
                  });
    return indices;
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
    const KernelTable& k = cpu::kernels();
    const int64_t step = k.select_block_queries(p), parts = blocks(p.query_tile, step);
    pack_keys(s, step);
    for_each_task(p.batch * groups * tiles * parts, k.select_scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      const int64_t head = i / (tiles * parts), n = i / parts % tiles;
                      const int64_t begin = n * p.query_tile + i % parts * step;
                      const int64_t end = std::min({begin + step, (n + 1) * p.query_tile, p.query_length});
                      if (begin < end)
                          k.select(p, head / groups, head % groups, {begin, end}, s.packed.get(), scratch);
                  });
    return indices;
}

}  // namespace sparse_attn
