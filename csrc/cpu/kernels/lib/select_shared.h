// One selection for R heads: the tiles of a few queries are stored as rows [R, keys], turned into softmax
// probabilities, summed over the heads, and the sums are streamed past each query's threshold.
#pragma once

#include "elementary.h"
#include "select_stream.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

SPARSE_ATTN_INLINE int64_t shared_heads(const SelectParams& p) {
    return p.heads / p.rule.groups;
}

// Queries of one stored tile when heads share: enough rows to fill the row groups.
SPARSE_ATTN_INLINE int64_t shared_queries(const SelectParams& p) {
    int64_t rows_per_query = p.heads / p.kv_heads < shared_heads(p) ? p.heads / p.kv_heads : shared_heads(p);
    return clamp<int64_t>(2 * MR / rows_per_query, 1, 2 * MR);
}

SPARSE_ATTN_INLINE int64_t shared_scratch_bytes(const SelectParams& p, int64_t column) {
    const int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    const int64_t query_rows = round_up(shared_queries(p) * shared_heads(p), MR);
    const int64_t stored = shared_queries(p) * shared_heads(p) * (panel_count(p) * NR * 4 + 64);
    return buffer * 12 + 128 + (query_rows + MR) * column * 4 + panel_count(p) * 12 + stored + 1024;
}

// The panels that hold a key which some query of a task sees.
struct Panels {
    int64_t* first;    // key of each
    uint32_t* inside;  // a bit per key: whether it lies in the tile's blocks (without blocks: yes)
    int64_t count;

    // The keys of panel n that a query sees, in the blocks or always kept.
    SPARSE_ATTN_INLINE uint32_t seen(int64_t n, const Visible& v) const {
        const uint32_t kept = low_bits(clamp<int64_t>(v.sink_end - first[n], 0, NR)) |
                              ~low_bits(clamp<int64_t>(v.end - first[n], 0, NR));
        return (inside[n] | kept) & low_bits(clamp<int64_t>(v.limit - first[n], 0, NR)) &
               ~low_bits(clamp<int64_t>(v.begin - first[n], 0, NR));
    }
};

// `all` is what the task's queries see and keep together: the widest of each part.
inline Panels panels_of(const SelectParams& p, int64_t b, int64_t group, Range queries, const Visible& all,
                        Scratch& scratch) {
    Panels panels{scratch.take<int64_t>(panel_count(p)), scratch.take<uint32_t>(panel_count(p)), 0};
    const int64_t from = all.begin / NR, total = (all.limit + NR - 1) / NR;
    for (int64_t n = from; n < total; ++n) panels.inside[n] = p.blocks ? 0u : ~0u;
    const KeyRanges ranges = key_ranges(p, b, group, queries.begin);
    for (int64_t m = 0; p.blocks && m < ranges.count; ++m) {
        const Range keys = ranges.at(m);
        for (int64_t n = maximum(from, keys.begin / NR); n * NR < minimum(keys.end, all.limit); ++n)
            panels.inside[n] |= low_bits(clamp<int64_t>(keys.end - n * NR, 0, NR)) &
                                ~low_bits(clamp<int64_t>(keys.begin - n * NR, 0, NR));
    }
    for (int64_t n = from; n < total; ++n) {
        const bool kept = n * NR < all.sink_end || (p.rule.window > 0 && (n + 1) * NR > all.end);
        if (!panels.inside[n] && !kept) continue;
        panels.inside[panels.count] = panels.inside[n];
        panels.first[panels.count++] = n * NR;
    }
    return panels;
}

// scores of one query and head, a panel after the other → exp(score − max) where it sees the key, 0
// elsewhere, NaN where the score is NaN; returns 1 / their sum with the sink's and without NaN (0 where
// nothing weighs), so that a NaN marks its own key alone.
inline float exponentiate(float* scores, const Panels& panels, const Visible& v, float scale, float sink) {
    const Vec factor = broadcast(scale);
    const Vec nothing = broadcast(-__builtin_inff());
    Vec top = max(broadcast(sink), nothing);
    for (int64_t n = 0; n < panels.count; ++n) {
        const uint32_t seen = panels.seen(n, v);
        for (int64_t j = 0; j < NR; j += W) {
            uint32_t lanes = seen >> j & low_bits(W);
            if (v.mask)
                for (uint32_t left = lanes; left; left &= left - 1)
                    if (!allowed(v, panels.first[n] + j + __builtin_ctz(left))) lanes &= ~(left & -left);
            const Vec s = where(lanes, load(scores + n * NR + j) * factor, nothing);
            store(scores + n * NR + j, s);
            top = max(s, top);  // skips NaN
        }
    }
    const float peak = max_lane(top);
    Vec total = zero();
    for (int64_t j = 0; j < panels.count * NR; j += W) {
        Vec s = load(scores + j);
        uint32_t nan = is_nan(s);
        // With peak −inf every score is −inf or NaN, and −inf − −inf must not become NaN.
        Vec e = peak == -__builtin_inff() ? where(nan, s, zero()) : exp(s - broadcast(peak));
        store(scores + j, e);
        total = total + where(is_nan(e), zero(), e);
    }
    // A sequence alone begins in the first lane, and its sum is to have the same order.
    alignas(64) float lanes[2 * W];
    store(lanes, total);
    store(lanes + W, total);
    float weight = sum(load(lanes + v.begin % W));
    if (sink > -__builtin_inff()) weight += max_lane(exp(broadcast(sink - peak)));
    return weight > 0 ? 1.0f / weight : 0.0f;
}

// The same of a query head's products, by the rule's scale, cap and sink.
inline float weigh_head(const SelectParams& p, float* scores, const Panels& panels, const Visible& v,
                        int64_t head) {
    const float scale = __builtin_fabsf(p.rule.scale), cap = p.rule.softcap;
    if (cap > 0) soft_cap(scores, panels.count * NR, scale, cap);
    return exponentiate(scores, panels, v, cap > 0 ? 1.0f : scale, sink_of(p.rule.sink_logits, head));
}

template <class T, class Tile>
void select_shared(const SelectParams& p, int64_t b, int64_t group, Range queries, const float* packed,
                   void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t word_count = words<Tile>(p), column = column_words<Tile>(p), sharing = shared_heads(p),
                  per_kv_head = p.heads / p.kv_heads;
    const int64_t rows = queries.end - queries.begin, buffer = candidate_capacity(p.top_k) + kSlack;
    const int32_t full = static_cast<int32_t>(candidate_capacity(p.top_k));
    int32_t* keys = scratch.take<int32_t>(buffer);
    Candidates c{scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, 0};
    // Rows of one key head are (query, head) pairs; a group covers whole key heads, or is one.
    const int64_t kv_heads = maximum<int64_t>(1, sharing / per_kv_head), heads_per_kv = sharing / kv_heads;
    const int64_t tile_rows = rows * heads_per_kv, padded_rows = round_up(tile_rows, MR);
    float* tile_queries = scratch.take<float>(padded_rows * column);

    Visible all = visible_to(p, b, group, queries.begin);
    for (int64_t i = 1; i < rows; ++i) {
        const Visible v = visible_to(p, b, group, queries.begin + i);
        if (v.begin == v.limit) continue;
        all = {minimum(all.begin, v.begin),
               maximum(all.sink_end, v.sink_end),
               minimum(all.end, v.end),
               maximum(all.limit, v.limit),
               nullptr,
               0};
    }
    const Panels panels = panels_of(p, b, group, queries, all, scratch);
    const int64_t length = panels.count * NR;
    float* scores = scratch.take<float>(rows * sharing * length);  // [rows, sharing, length]

    const bool trivial = !p.rule.mask && !p.blocks && all.limit - all.begin <= p.top_k;
    alignas(64) float tile[MR * NR];
    const Strides& s = p.query_strides;
    for (int64_t k = 0; k < kv_heads && !trivial; ++k) {
        const int64_t first_head = group * sharing + k * heads_per_kv;
        const float* head_keys =
            packed + (b * p.kv_heads + first_head / per_kv_head) * panel_count(p) * column * NR;
        for (int64_t start = 0; start < padded_rows; start += MR)
            for (int64_t r = 0; r < MR; ++r) {
                int64_t row = start + r, i = row / heads_per_kv, h = row % heads_per_kv;
                float* to = tile_queries + start * column + r;
                const T* from = static_cast<const T*>(p.query) + b * s.b + (first_head + h) * s.h +
                                (queries.begin + i) * s.t;
                if (row < tile_rows)
                    Tile::template pack_column<true>(to, MR, from, s.d, p.head_dim, word_count,
                                                     sign_of(p.rule.scale));
                else
                    for (int64_t w = 0; w < column; ++w) to[w * MR] = 0.0f;
            }
        for (int64_t n = 0; n < panels.count; ++n)
            for (int64_t start = 0; start < padded_rows; start += MR) {
                score_tile<Tile, false>(tile, tile_queries + start * column,
                                        head_keys + panels.first[n] * column, word_count, nullptr, nullptr);
                for (int64_t r = 0; r < minimum<int64_t>(MR, tile_rows - start); ++r) {
                    int64_t row = start + r, i = row / heads_per_kv,
                            h = k * heads_per_kv + row % heads_per_kv;
                    memcpy(scores + (i * sharing + h) * length + n * NR, tile + r * NR, NR * 4);
                }
            }
    }

    int32_t* out = p.indices + ((b * p.rule.groups + group) * p.query_length + queries.begin) * p.top_k;
    float* weight = scratch.take<float>(sharing);
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        const Visible v = visible_to(p, b, group, queries.begin + i);
        c.count = 0;
        c.keep = static_cast<int32_t>(p.top_k - forced_count(v));
        if (c.keep > 0 && !v.mask && !p.blocks && v.end - v.sink_end <= c.keep) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        } else if (c.keep > 0) {
            float* row = scores + i * sharing * length;
            Panels own = panels;  // up to the last that this query sees
            while (own.count > 0 && own.first[own.count - 1] >= v.limit) --own.count;
            for (int64_t h = 0; h < sharing; ++h) {
                weight[h] = weigh_head(p, row + h * length, own, v, group * sharing + h);
            }
            float threshold = open_threshold();
            for (int64_t n = 0; n < own.count; ++n)
                for (int64_t j = 0; j < NR; j += W) {
                    const uint32_t candidates = candidate_bits(v, own.first[n] + j, W) & own.inside[n] >> j;
                    if (!candidates) continue;
                    Vec mass = zero();
                    for (int64_t h = 0; h < sharing; ++h)
                        mass = fma(load(row + h * length + n * NR + j), broadcast(weight[h]), mass);
                    const uint32_t bits = not_le(mass, broadcast(threshold)) & candidates;
                    if (!bits) continue;
                    c.count += append(c.scores + c.count, c.indices + c.count, bits, mass,
                                      static_cast<int32_t>(own.first[n] + j));
                    if (c.count > full) threshold = keep_best<true>(c, keys);
                }
            keep_best<false>(c, keys);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
