// Selection of a few queries (decoding), where reading the keys is the price: the way round cpu/selection.h.
#pragma once

#include <vector>

#include "cpu/kernels/topk_decode.h"
#include "cpu/selection.h"

SPARSE_ATTN_FIND_KERNELS(topk_decode, DecodeKernels)

namespace sparse_attn {

constexpr int64_t kDecodeQueries = 16;  // at most so many
constexpr int64_t kDecodeScores = int64_t{1}
                                  << 26;  // and so many scores stored where heads share a selection

inline int64_t stored_scores(const SelectParams& p) {
    return p.rule.groups == p.heads ? 0 : p.batch * p.heads * p.query_length * p.key_length;
}

// Whether these queries take this way; the result is the same, to the bit.
inline bool decodes(const SelectParams& p) {
    if (p.query_length > kDecodeQueries || p.rounded || p.blocks || !needs_scores(p)) return false;
    if (p.key_strides.d != 1 && p.head_dim > 1) return false;
    return stored_scores(p) <= kDecodeScores;
}

// A few queries of a batch, or of one sequence of a pack.
inline DecodeParams decode_params(const SelectParams& p, const KeyIndexParams& index = {}) {
    DecodeParams d{};
    d.select = p;
    d.index = index;
    d.group_rows = p.query_length;
    return d;
}

// Fills the indices of all calls, which differ in their sequences and in nothing else. Threads share the keys of
// all of them. As soon as the row of a group and query is there, row_done(call, b, group, query, scratch) is
// called by some thread, with row_bytes of scratch.
template <class F>
void decode(DecodeParams* calls, int64_t count, int64_t row_bytes, const F& row_done) {
    const cpu::DecodeKernels& k = cpu::topk_decode_kernels();
    if (count == 0) return;
    const int64_t kv_heads = calls[0].select.kv_heads, heads = calls[0].select.heads;
    const int64_t groups = calls[0].select.rule.groups, sharing = heads / kv_heads;
    const bool shared = groups != heads;
    double products = 0.0;
    int64_t scans = 0, panels = 0;  // of all key heads
    for (int64_t c = 0; c < count; ++c) {
        const SelectParams& p = calls[c].select;
        products += static_cast<double>(p.batch * heads * p.query_length) * p.key_length * p.head_dim;
        scans += p.batch * kv_heads;
        panels += p.batch * kv_heads * k.panels(p);
    }
    const bool parallel = worth_threads(products);
    // Enough tasks that no thread waits long for the last, none so short that its first keys, which all pass,
    // count.
    const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
    const bool even = count == 1 && scans % threads == 0;
    const int64_t longest = even ? panels : std::max<int64_t>(1, blocks(panels, 4 * threads));

    struct Task {
        int64_t call, head, chunk, panels;
    };
    std::vector<Task> scan, finish;  // of those that finish, the chunk is a query
    int64_t scan_bytes = 0, choose_bytes = row_bytes, memory = 0;
    const auto place = [&](int64_t bytes) {
        const int64_t at = memory;
        memory += blocks(bytes, 64) * 64;
        return at;
    };
    std::vector<int64_t> places;
    for (int64_t c = 0; c < count; ++c) {
        DecodeParams& d = calls[c];
        const SelectParams& p = d.select;
        const int64_t own = k.panels(p), rows = p.batch * heads * p.query_length;
        const int64_t least = blocks(std::max<int64_t>(1024, 4 * p.top_k), k.panel_keys());
        const int64_t parts = std::max<int64_t>(1, blocks(own, std::max(longest, least)));
        d.chunk = std::max<int64_t>(1, blocks(blocks(own, parts), 2)) * 2;  // whole blocks of an index, too
        d.chunks = std::max<int64_t>(1, blocks(own, d.chunk));
        d.kept = std::min(p.top_k, d.chunk * k.panel_keys());
        d.length = own * k.panel_keys();
        const int64_t lists = rows * d.chunks;
        places.push_back(place(shared ? (rows * d.length + rows) * 4 : lists * (d.kept * 8 + 4)));
        const bool whole = d.chunks == 1 && !shared;  // one task does it all
        choose_bytes = std::max(choose_bytes, k.choose.scratch_bytes(d));
        scan_bytes = std::max({scan_bytes, k.scan.scratch_bytes(d), whole ? choose_bytes : 0});
        for (int64_t i = 0; i < p.batch * kv_heads * d.chunks; ++i) {
            const int64_t part = std::min(d.chunk, own - i % d.chunks * d.chunk);
            scan.push_back({c, i / d.chunks, i % d.chunks, part});
        }
        for (int64_t i = 0; !whole && i < p.batch * groups * p.query_length; ++i)
            finish.push_back({c, i / p.query_length, i % p.query_length, 0});
    }
    // The longest first.
    if (count > 1)
        std::stable_sort(scan.begin(), scan.end(),
                         [](const Task& a, const Task& b) { return a.panels > b.panels; });
    const Memory stored = allocate(memory);
    for (int64_t c = 0; c < count; ++c) {
        DecodeParams& d = calls[c];
        const int64_t rows = d.select.batch * heads * d.select.query_length, lists = rows * d.chunks;
        float* at = reinterpret_cast<float*>(stored.get() + places[static_cast<size_t>(c)]);
        if (shared) {
            d.scores = at;
            d.weights = d.scores + rows * d.length;
        } else {
            d.best_scores = at;
            d.best_indices = reinterpret_cast<int32_t*>(d.best_scores + lists * d.kept);
            d.best_counts = d.best_indices + lists * d.kept;
        }
    }

    const auto choose = [&](int64_t c, int64_t b, int64_t group, int64_t query, char* scratch) {
        k.choose.run(calls[c], {b, group, query}, scratch);
        row_done(c, b, group, query, scratch);
    };
    for_each_task(static_cast<int64_t>(scan.size()), scan_bytes, parallel, [&](int64_t i, char* scratch) {
        const Task& t = scan[static_cast<size_t>(i)];
        const DecodeParams& d = calls[t.call];
        const int64_t b = t.head / kv_heads, kv = t.head % kv_heads;
        k.scan.run(d, {b, kv, t.chunk}, scratch);
        const bool whole = d.chunks == 1 && !shared;
        for (int64_t h = kv * sharing; whole && h < (kv + 1) * sharing; ++h)
            for (int64_t q = 0; q < d.select.query_length; ++q) choose(t.call, b, h, q, scratch);
    });
    const int64_t left = static_cast<int64_t>(finish.size()), each = heads / groups;
    if (shared)
        for_each_task(left * each, choose_bytes, parallel, [&](int64_t i, char* scratch) {
            const Task& t = finish[static_cast<size_t>(i / each)];
            k.weigh(calls[t.call], {t.head / groups, t.head % groups * each + i % each, t.chunk}, scratch);
        });
    for_each_task(left, choose_bytes, parallel, [&](int64_t i, char* scratch) {
        const Task& t = finish[static_cast<size_t>(i)];
        choose(t.call, t.head / groups, t.head % groups, t.chunk, scratch);
    });
}

// The same of one call: row_done(b, group, query, scratch).
template <class F>
void decode(const SelectParams& p, int64_t row_bytes, const F& row_done, const KeyIndexParams& index = {}) {
    DecodeParams d = decode_params(p, index);
    decode(&d, 1, row_bytes,
           [&](int64_t, int64_t b, int64_t group, int64_t i, char* scratch) { row_done(b, group, i, scratch); });
}

}  // namespace sparse_attn
