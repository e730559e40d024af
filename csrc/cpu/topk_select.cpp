// topk_select on the CPU, from torch's tensors to the kernels. Arguments are validated in Python first, with
// better words; the checks here keep a direct call of an op from reading or writing out of bounds.
#include <torch/csrc/stable/library.h>

#include "cpu/packed.h"

namespace sparse_attn {
namespace {

// Only the keys of a tile's blocks [B, G, N, M] are candidates: a row for each of the N tiles of query_tile
// queries.
void set_blocks(SelectParams& p, const char* op, Tensor& chosen, int64_t block_size, int64_t query_tile) {
    STD_TORCH_CHECK(block_size >= 1 && query_tile >= 1, op,
                    ": block_size and query_tile must be at least 1; got ", block_size, " and ", query_tile);
    // Longer ones change nothing, and sums of them still fit.
    p.block_size = std::min(block_size, std::max<int64_t>(1, p.key_length));
    p.query_tile = std::min(query_tile, std::max<int64_t>(1, p.query_length));
    STD_TORCH_CHECK(chosen.scalar_type() == ScalarType::Int && chosen.dim() == 4 &&
                        chosen.size(0) == p.batch && chosen.size(1) == p.rule.groups &&
                        chosen.size(2) == blocks(p.query_length, p.query_tile),
                    op, ": blocks must be int32 [B, G, N, M], N tiles of queries; got ", shape_of(chosen));
    chosen = with_contiguous_rows(chosen);
    static constexpr int32_t kNone = -1;
    p.block_slots = chosen.size(3);
    p.blocks = p.block_slots ? static_cast<const int32_t*>(chosen.const_data_ptr()) : &kNone;
    p.blocks_strides = strides_of(chosen);
}

Tensor topk_select_cpu(Tensor query, Tensor key, int64_t top_k, SPARSE_ATTN_RULE_PARAMETERS, bool rounded,
                       std::optional<Tensor> chosen, int64_t block_size, int64_t query_tile) {
    const char* op = "topk_select.cpu";
    check_qkv(op, query, key, nullptr);
    Selection s;
    prepare_selection(s, op, query, key, top_k, {SPARSE_ATTN_RULE_ARGUMENTS}, rounded);
    SelectParams& p = s.params;
    if (chosen) set_blocks(p, op, *chosen, block_size, query_tile);
    Tensor indices = new_indices(query, p);
    if (indices.numel() == 0) return indices;
    if (!chosen) {
        select_rows(s, 0, [](int64_t, int64_t, cpu::Range, char*) {});
        return indices;
    }
    const cpu::SelectKernels& k = cpu::topk_select_kernels();
    const int64_t step = k.block_queries(p);
    pack_keys(s, step);
    // A task's queries lie in one tile. The longest rows first.
    const int64_t tile = p.query_tile, parts = blocks(tile, step);
    const int64_t per_head = blocks(p.query_length, tile) * parts, groups = p.rule.groups;
    for_each_task(
        p.batch * groups * per_head, k.select.scratch_bytes(p), s.parallel, [&](int64_t i, char* scratch) {
            const int64_t head = i / per_head, n = per_head - 1 - i % per_head, first = n / parts * tile;
            const int64_t begin = first + n % parts * step;
            const int64_t end = std::min({begin + step, first + tile, p.query_length});
            if (begin < end)
                k.select.run(p, {head / groups, head % groups, {begin, end}, s.packed.get()}, scratch);
        });
    return indices;
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def("topk_select.cpu(Tensor query, Tensor key, SymInt top_k, " SPARSE_ATTN_RULE_SCHEMA
          ", bool rounded, Tensor? blocks, SymInt block_size, SymInt query_tile) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("topk_select.cpu", TORCH_BOX(&sparse_attn::topk_select_cpu));
}
