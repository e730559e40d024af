// Selection of a few queries (decoding), where reading the keys is the price: the way round cpu/selection.h.
#pragma once

#include "cpu/kernels/topk_decode.h"
#include "cpu/selection.h"

SPARSE_ATTN_FIND_KERNELS(topk_decode, DecodeKernels)

namespace sparse_attn {

constexpr int64_t kDecodeQueries = 16;  // at most so many
constexpr int64_t kDecodeScores = int64_t{1}
                                  << 26;  // and so many scores stored where heads share a selection

// Whether these queries take this way; the result is the same, to the bit.
inline bool decodes(const SelectParams& p) {
    if (p.query_length > kDecodeQueries || p.rounded || p.blocks || !needs_scores(p)) return false;
    if (p.key_strides.d != 1 && p.head_dim > 1) return false;
    return p.rule.groups == p.heads || p.batch * p.heads * p.query_length * p.key_length <= kDecodeScores;
}

// Fills the indices. As soon as the row of a group and query is there, row_done(b, group, query, scratch) is
// called by some thread, with row_bytes of scratch.
template <class F>
void decode(const SelectParams& p, int64_t row_bytes, const F& row_done, const KeyIndexParams& index = {}) {
    const cpu::DecodeKernels& k = cpu::topk_decode_kernels();
    DecodeParams d{};
    d.select = p;
    d.index = index;
    const int64_t panels = k.panels(p), heads = p.batch * p.kv_heads, groups = p.rule.groups;
    const int64_t rows = p.batch * p.heads * p.query_length, selections = p.batch * groups * p.query_length;
    const double products = static_cast<double>(rows) * p.key_length * p.head_dim;
    const bool parallel = worth_threads(products), shared = groups != p.heads;
    // Enough tasks that no thread waits long for the last, none so short that its first keys, which all pass,
    // count.
    const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
    const int64_t wanted = heads % threads == 0 ? 1 : blocks(4 * threads, heads);
    const int64_t least = blocks(std::max<int64_t>(1024, 4 * p.top_k), k.panel_keys());
    d.chunk = blocks(std::max(blocks(panels, wanted), least), 2) * 2;  // whole blocks of an index, too
    d.chunks = std::max<int64_t>(1, blocks(panels, d.chunk));
    d.kept = std::min(p.top_k, d.chunk * k.panel_keys());

    Memory best, stored;
    if (shared) {
        d.length = panels * k.panel_keys();
        stored = allocate((rows * d.length + rows) * 4);
        d.scores = reinterpret_cast<float*>(stored.get());
        d.weights = d.scores + rows * d.length;
    } else {
        const int64_t lists = rows * d.chunks;
        const bool bounds = index.codes != nullptr && d.chunks > 1;
        d.room = bounds ? k.index_room(d.kept) : d.kept;
        best = allocate(lists * (d.room * (bounds ? 12 : 8) + 4));
        d.best_scores = reinterpret_cast<float*>(best.get());
        d.best_indices = reinterpret_cast<int32_t*>(d.best_scores + lists * d.room);
        d.best_counts = d.best_indices + lists * d.room;
        if (bounds) d.best_above = reinterpret_cast<float*>(d.best_counts + lists);
    }
    const int64_t choose_bytes = std::max(k.choose.scratch_bytes(d), row_bytes);
    const auto finish = [&](int64_t b, int64_t group, int64_t query, char* scratch) {
        k.choose.run(d, {b, group, query}, scratch);
        row_done(b, group, query, scratch);
    };
    const bool whole = d.chunks == 1 && !shared;  // one task does it all
    const int64_t scan_bytes = std::max(k.scan.scratch_bytes(d), whole ? choose_bytes : 0);
    for_each_task(heads * d.chunks, scan_bytes, parallel, [&](int64_t i, char* scratch) {
        const int64_t head = i / d.chunks, b = head / p.kv_heads, kv = head % p.kv_heads;
        k.scan.run(d, {b, kv, i % d.chunks}, scratch);
        const int64_t sharing = p.heads / p.kv_heads;
        for (int64_t h = kv * sharing; whole && h < (kv + 1) * sharing; ++h)
            for (int64_t q = 0; q < p.query_length; ++q) finish(b, h, q, scratch);
    });
    if (whole) return;
    if (shared)
        for_each_task(rows, choose_bytes, parallel, [&](int64_t i, char* scratch) {
            const int64_t head = i / p.query_length;
            k.weigh(d, {head / p.heads, head % p.heads, i % p.query_length}, scratch);
        });
    for_each_task(selections, choose_bytes, parallel, [&](int64_t i, char* scratch) {
        const int64_t head = i / p.query_length;
        finish(head / groups, head % groups, i % p.query_length, scratch);
    });
}

}  // namespace sparse_attn
