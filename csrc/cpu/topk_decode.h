// Selection of a few queries (decoding), where reading the keys is the price: the way round cpu/selection.h.
#pragma once

#include <atomic>
#include <memory>
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

// The rows of an index of so many batch entries, or pages, of key heads with N blocks of keys each.
inline KeyIndexParams key_index_of(const char* op, int64_t batch, int64_t heads, int64_t n, int64_t dim,
                                   const Tensor& codes, const Tensor& bounds, const Tensor& shift,
                                   const std::vector<int64_t>& shift_shape) {
    const int64_t keys = cpu::kIndexKeys;
    const auto fits = [&](const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) {
        bool ok =
            t.scalar_type() == type && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
        for (size_t d = 0; ok && d < shape.size(); ++d) ok = t.size(static_cast<int64_t>(d)) == shape[d];
        return ok;
    };
    STD_TORCH_CHECK(fits(codes, ScalarType::Char, {batch, heads, n, blocks(dim, 4), keys, 4}) &&
                        fits(bounds, ScalarType::Float, {batch, heads, n, 3, keys}) &&
                        fits(shift, ScalarType::Float, shift_shape),
                    op, ": the index must be int8 [B, Hkv, N, ⌈D/4⌉, 16, 4], float32 [B, Hkv, N, 3, 16] and ",
                    "float32 ", numbers_of(shift_shape), ", contiguous, with B, Hkv, N, D = ", batch, ", ",
                    heads, ", ", n, ", ", dim, "; got ", shape_of(codes), ", ", shape_of(bounds), ", ",
                    shape_of(shift));
    return {static_cast<const int8_t*>(codes.const_data_ptr()),
            static_cast<const float*>(bounds.const_data_ptr()),
            static_cast<const float*>(shift.const_data_ptr()), n};
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

// How many key heads a task scans together: all of them where a token's heads lie side by side, so that
// memory is read from end to end once.
inline int64_t heads_together(const DecodeParams& d) {
    const SelectParams& p = d.select;
    const int64_t step = d.pages.size == 1 ? p.key_strides.b : p.key_strides.t;
    if (d.index.codes || p.key_strides.h != p.head_dim || step < p.kv_heads * p.head_dim) return 1;
    // What is kept of all their queries stays in cache.
    constexpr int64_t kBytes = int64_t{1} << 20;
    const int64_t of_head = p.heads / p.kv_heads * p.query_length * (2 * p.top_k + 256) * 8;
    int64_t together = p.kv_heads;
    while (together > 1 && p.rule.groups == p.heads && together * of_head > kBytes)
        together = together % 2 ? 1 : together / 2;
    return together;
}

// Fills the indices of all calls, which differ in their sequences and in nothing else. Threads share the keys
// of all of them. As soon as the row of a group and query is there, row_done(call, b, group, query, scratch)
// is called by some thread, with row_bytes of scratch.
template <class F>
void decode(DecodeParams* calls, int64_t count, int64_t row_bytes, const F& row_done) {
    const cpu::DecodeKernels& k = cpu::topk_decode_kernels();
    if (count == 0) return;
    const int64_t heads = calls[0].select.heads, groups = calls[0].select.rule.groups;
    const bool shared = groups != heads;
    const int64_t together = heads_together(calls[0]);  // of key heads
    const int64_t units = calls[0].select.kv_heads / together, sharing = heads / units;
    double products = 0.0;
    int64_t scans = 0, panels = 0;  // of all such units of key heads
    for (int64_t c = 0; c < count; ++c) {
        const SelectParams& p = calls[c].select;
        products += static_cast<double>(p.batch * heads * p.query_length) * p.key_length * p.head_dim;
        scans += p.batch * units;
        panels += p.batch * units * k.panels(p);
    }
    const bool parallel = worth_threads(products);
    // Enough tasks that no thread waits long for the last, none so short that its first keys, which all pass,
    // count.
    const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
    const bool even = count == 1 && scans % threads == 0;
    const int64_t longest = even ? panels : std::max<int64_t>(1, blocks(panels, 4 * threads));

    // Where heads that lie side by side in a token are scanned one after the other, those of a chunk follow
    // each other while the machine still knows its pages of memory.
    constexpr int64_t kChunkBytes = int64_t{4} << 20;
    const SelectParams& any = calls[0].select;
    const int64_t token_bytes = any.key_strides.t * (any.dtype == DType::kFloat32 ? 4 : 2);
    const bool beside = together < any.kv_heads && any.key_strides.t > 2 * any.head_dim;
    // Many units: the rows of each are finished by whoever scans its last chunk, while some of it is in
    // cache.
    const bool at_once = !shared && scans >= 2 * threads;

    struct Task {
        int64_t call, unit, chunk, panels;
    };
    std::vector<Task> scan, finish;  // of those that finish, the unit is a group, the chunk a query
    int64_t scan_bytes = 0, choose_bytes = row_bytes, memory = 0;
    const auto place = [&](int64_t bytes) {
        const int64_t at = memory;
        memory += blocks(bytes, 64) * 64;
        return at;
    };
    std::vector<int64_t> places, firsts;  // of each call: its memory, its first unit among those of all
    int64_t counted = 0;
    for (int64_t c = 0; c < count; ++c) {
        DecodeParams& d = calls[c];
        const SelectParams& p = d.select;
        const int64_t own = k.panels(p), rows = p.batch * heads * p.query_length;
        const int64_t least = blocks(std::max<int64_t>(1024, 4 * p.top_k), k.panel_keys());
        int64_t most = longest;
        if (beside && at_once && token_bytes > 0 && !d.index.codes)
            most = std::min(most, blocks(kChunkBytes / token_bytes, k.panel_keys()));
        const int64_t parts = std::max<int64_t>(1, blocks(own, std::max(most, least)));
        d.chunk = std::max<int64_t>(1, blocks(blocks(own, parts), 2)) * 2;  // whole blocks of an index, too
        d.chunks = std::max<int64_t>(1, blocks(own, d.chunk));
        d.heads = together;
        d.kept = std::min(p.top_k, d.chunk * k.panel_keys());
        d.length = own * k.panel_keys();
        const int64_t lists = rows * d.chunks;
        const bool bounds = !shared && d.index.codes && d.chunks > 1;
        d.room = bounds ? k.index_room(d.kept) : d.kept;
        places.push_back(
            place(shared ? (rows * d.length + rows) * 4 : lists * (d.room * (bounds ? 12 : 8) + 4)));
        const bool whole = at_once || (d.chunks == 1 && !shared);  // one task does it all
        const int64_t all = p.batch * units;
        for (int64_t i = 0; i < all * d.chunks; ++i) scan.push_back({c, i % all, i / all, own});
        firsts.push_back(counted);
        counted += all;
        for (int64_t i = 0; !whole && i < p.batch * groups * p.query_length; ++i)
            finish.push_back({c, i / p.query_length, i % p.query_length, 0});
    }
    // The longest calls first.
    if (count > 1)
        std::stable_sort(scan.begin(), scan.end(),
                         [](const Task& a, const Task& b) { return a.panels > b.panels; });
    const auto chunks_left = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(counted));
    const Memory stored = allocate(memory);
    for (int64_t c = 0; c < count; ++c) {
        DecodeParams& d = calls[c];
        const int64_t rows = d.select.batch * heads * d.select.query_length, lists = rows * d.chunks;
        for (int64_t h = 0; h < d.select.batch * units; ++h)
            chunks_left[static_cast<size_t>(firsts[static_cast<size_t>(c)] + h)] = d.chunks;
        float* at = reinterpret_cast<float*>(stored.get() + places[static_cast<size_t>(c)]);
        if (shared) {
            d.scores = at;
            d.weights = d.scores + rows * d.length;
        } else {
            d.best_scores = at;
            d.best_indices = reinterpret_cast<int32_t*>(d.best_scores + lists * d.room);
            d.best_counts = d.best_indices + lists * d.room;
            if (d.index.codes && d.chunks > 1) d.best_above = reinterpret_cast<float*>(d.best_counts + lists);
        }
        const bool whole = at_once || (d.chunks == 1 && !shared);
        choose_bytes = std::max(choose_bytes, k.choose.scratch_bytes(d));
        scan_bytes = std::max({scan_bytes, k.scan.scratch_bytes(d), whole ? choose_bytes : 0});
    }

    const auto choose = [&](int64_t c, int64_t b, int64_t group, int64_t query, char* scratch) {
        k.choose.run(calls[c], {b, group, query}, scratch);
        row_done(c, b, group, query, scratch);
    };
    for_each_task(static_cast<int64_t>(scan.size()), scan_bytes, parallel, [&](int64_t i, char* scratch) {
        const Task& t = scan[static_cast<size_t>(i)];
        const DecodeParams& d = calls[t.call];
        const int64_t b = t.unit / units, unit = t.unit % units;
        k.scan.run(d, {b, unit * together, t.chunk}, scratch);
        const size_t counter = static_cast<size_t>(firsts[static_cast<size_t>(t.call)] + t.unit);
        const bool whole = !shared && (at_once || d.chunks == 1) && --chunks_left[counter] == 0;
        for (int64_t h = unit * sharing; whole && h < (unit + 1) * sharing; ++h)
            for (int64_t q = 0; q < d.select.query_length; ++q) choose(t.call, b, h, q, scratch);
    });
    const int64_t left = static_cast<int64_t>(finish.size()), each = heads / groups;
    if (shared)
        for_each_task(left * each, choose_bytes, parallel, [&](int64_t i, char* scratch) {
            const Task& t = finish[static_cast<size_t>(i / each)];
            k.weigh(calls[t.call], {t.unit / groups, t.unit % groups * each + i % each, t.chunk}, scratch);
        });
    for_each_task(left, choose_bytes, parallel, [&](int64_t i, char* scratch) {
        const Task& t = finish[static_cast<size_t>(i)];
        choose(t.call, t.unit / groups, t.unit % groups, t.chunk, scratch);
    });
}

// The same of one call: row_done(b, group, query, scratch).
template <class F>
void decode(const SelectParams& p, int64_t row_bytes, const F& row_done, const KeyIndexParams& index = {}) {
    DecodeParams d = decode_params(p, index);
    decode(&d, 1, row_bytes, [&](int64_t, int64_t b, int64_t group, int64_t i, char* scratch) {
        row_done(b, group, i, scratch);
    });
}

}  // namespace sparse_attn
