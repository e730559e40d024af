// Exact selection from rounded scores. With rows q, k in float32 and their rounded twins q̂, k̂
//
//   |q·k − q̂·k̂| ≤ ‖q − q̂‖·‖k‖ + ‖q̂‖·‖k − k̂‖                                (Cauchy–Schwarz)
//
// so every rounded score has a lower and an upper bound of the exact one, up to the same constant for all
// keys of a row (keys are shifted, which moves all scores of a query alike). A key whose upper bound does not
// beat the K-th best lower bound among keys before it loses to K of them, ties included. What is left is
// ranked by the exact score, computed as the full product computes it: the selection has the same bits.
#pragma once

#include "exact_scores.h"
#include "rounded_tile.h"
#include "select_shared.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct Bounded {
    float *upper, *lower;  // [capacity + slack]
    int32_t* indices;      // [capacity + slack]
    int32_t count;
    int32_t keep;
};

// A row whose bounds leave more than three quarters of its buffer is given up.
SPARSE_ATTN_INLINE int64_t bounded_capacity(int64_t keep) {
    return round_up(2 * keep + maximum<int64_t>(keep, 128), Vec::W);
}

// Drops what the bounds rule out, keeping the order. Returns the new threshold: at least `keep` of what is
// left have no smaller lower bound.
inline float prune(Bounded& c, float threshold, int32_t* keys) {
    if (c.count < c.keep) return threshold;
    const int32_t padded = order_all(c.lower, c.count, keys);
    const Cut cut = find_cut(keys, c.count, padded, c.keep, c.keep + c.keep / 8, order_of(threshold));
    threshold = maximum(threshold, float_of_order(cut.low));
    const Vec bound = broadcast(threshold);
    int32_t n = 0;
    for (int32_t i = 0; i < c.count; i += W) {
        const Vec upper = load(c.upper + i), lower = load(c.lower + i);
        const uint32_t bits = ~not_le(bound, upper) & low_bits(minimum<int32_t>(W, c.count - i));
        compress_floats(c.lower + n, bits, lower);
        n += compress_to(c.upper + n, c.indices + n, bits, c.upper + i, c.indices + i);
    }
    c.count = n;
    return threshold;
}

// What a row group needs to make bounds of sums, a lane per row.
struct alignas(64) RowFacts {
    float threshold[W];  // of upper bounds; −∞ lets all pass, +∞ none
    float scale[W], inverse[W];
    float norm[W], error[W];  // of the rounded row (or larger), of its rounding
};

SPARSE_ATTN_INLINE int64_t bounds_scratch_bytes(const SelectParams& p, int64_t column) {
    const int64_t buffer = bounded_capacity(p.top_k) + kSlack;
    return kBlockRows * (buffer * 12 + 192) + buffer * 12 + pair_words(p.head_dim) * (kBlockRows + W) * 4 +
           p.head_dim * W * 4 + column * 4 + 2048;
}

template <class T, class Tile>
struct BoundedRows {
    const SelectParams& p;
    const T *query, *key;    // the head's rows
    const uint32_t* panels;  // of its key head
    Scratch& scratch;
    const int64_t word_count, buffer;
    const int32_t full;
    int32_t* keys;
    float* scores;
    int32_t* places;
    uint32_t* queries;  // [kRowGroups][words][MR]
    uint32_t* wide;     // [words][W]
    float* columns;     // [D][W]
    float* exact_query;
    Survivors& survivors;

    BoundedRows(const SelectParams& p_, const T* query_, const T* key_, const uint32_t* panels_, Scratch& s,
                Survivors& survivors_)
        : p(p_),
          query(query_),
          key(key_),
          panels(panels_),
          scratch(s),
          word_count(pair_words(p.head_dim)),
          buffer(bounded_capacity(p.top_k) + kSlack),
          full(static_cast<int32_t>(bounded_capacity(p.top_k))),
          keys(s.take<int32_t>(buffer)),
          scores(s.take<float>(buffer)),
          places(s.take<int32_t>(buffer)),
          queries(s.take<uint32_t>(word_count * kBlockRows)),
          wide(s.take<uint32_t>(word_count * W)),
          columns(s.take<float>(p.head_dim * W)),
          exact_query(s.take<float>(words<Tile>(p))),
          survivors(survivors_) {}

    // Rounds the rows [first, first + rows); false if one of `wanted` has no bounds.
    bool prepare(int g, int64_t first, int64_t rows, uint32_t wanted, RowFacts& facts) {
        const Strides& s = p.query_strides;
        const Vec as_is = load_columns(columns, query + first * s.t, rows, s.t, s.d, p.head_dim,
                                       sign_of(p.rule.scale), nullptr);
        rotate(columns, p.head_dim);
        float norms[W], scale[W], inverse[W];
        store(norms, as_is);
        for (int r = 0; r < MR; ++r)
            if (wanted >> r & 1 && !(norms[r] >= kSmallest && norms[r] <= kLargest)) return false;
        store(scale, largest_of(columns, p.head_dim));
        for (int r = 0; r < W; ++r) {
            const bool usable = scale[r] >= kSmallest / 1024 && scale[r] <= 2 * kLargest;
            scale[r] = usable ? scale[r] / largest_whole(p.head_dim) : 1.0f;
            inverse[r] = 1.0f / scale[r];
        }
        uint32_t* to = queries + g * word_count * MR;
        const RoundedNorms n = round_columns(wide, W, columns, p.head_dim, load(scale), load(inverse));
        for (int64_t w = 0; w < word_count; ++w) memcpy(to + w * MR, wide + w * W, MR * 4);
        memcpy(facts.scale, scale, sizeof scale);
        memcpy(facts.inverse, inverse, sizeof inverse);
        store(facts.norm, max(n.norm + n.error, as_is));
        store(facts.error, n.error);
        return true;
    }

    // The exact best of a row's candidates, in place and in order.
    void finish(Bounded& c, float threshold, int64_t row) {
        ++survivors.rows;
        survivors.budget += c.keep;
        prune(c, threshold, keys);
        survivors.kept += c.count;
        if (c.count <= c.keep) return;
        // At most `keep` candidates reach `sure` with their upper bounds: one that does with its lower bound
        // is chosen, whatever the exact scores are.
        const int32_t padded = order_all(c.upper, c.count, keys);
        const int32_t sure_keys = maximum(1, c.keep - c.keep / 8);
        const Cut cut = find_cut(keys, c.count, padded, sure_keys, c.keep);
        const float sure = cut.at_least <= c.keep ? float_of_order(cut.low) : __builtin_inff();
        int32_t n = 0;
        for (int32_t i = 0; i < c.count; i += W) {
            const Vec lower = load(c.lower + i);
            const uint32_t open = not_le(broadcast(sure), lower) & low_bits(minimum<int32_t>(W, c.count - i));
            for (uint32_t left = open; left; left &= left - 1) places[n++] = i + __builtin_ctz(left);
        }
        survivors.scored += n;
        int32_t* unsure = keys;
        for (int32_t i = 0; i < n; ++i) unsure[i] = c.indices[places[i]];
        const Strides& s = p.query_strides;
        Tile::template pack_column<true>(exact_query, 1, query + row * s.t, s.d, p.head_dim, words<Tile>(p),
                                         sign_of(p.rule.scale));
        exact_scores<T, Tile>(p, exact_query, key, unsure, n, scores);
        for (int32_t i = 0; i < c.count; ++i) c.upper[i] = __builtin_inff();
        for (int32_t i = 0; i < n; ++i) c.upper[places[i]] = scores[i];
        Candidates ranked{c.upper, c.indices, c.count, c.keep};
        keep_best<false>(ranked, keys);
        c.count = ranked.count;
    }
};

// The sums above which some key of a panel may beat the threshold of its row with its upper bound.
SPARSE_ATTN_INLINE void thresholds(const RowFacts& rows, const PanelFacts& panel, int32_t* bound) {
    const Vec margin = fma(load(rows.error), broadcast(panel.norm), load(rows.norm) * broadcast(panel.error));
    const Vec sums = (load(rows.threshold) - margin) * load(rows.inverse) * broadcast(panel.inverse);
    const Vec most = broadcast(0x1.fffffep30f);
    // Never above the whole number below.
    const Vec whole = round_even(max(sums, zero() - most) - broadcast(0.5f));
    store_whole(bound, zero() - max(zero() - whole, zero() - most));
}

// Appends those of the marked keys of a panel whose own upper bounds beat the threshold of row r.
SPARSE_ATTN_INLINE int32_t append_bounded(const Bounded& c, const int32_t* sums, uint32_t bits,
                                          const RowFacts& rows, int r, const PanelFacts& panel,
                                          const float* norms, int32_t base) {
    const Vec scale = broadcast(rows.scale[r] * panel.scale), threshold = broadcast(rows.threshold[r]);
    const Vec norm = broadcast(rows.norm[r]), error = broadcast(rows.error[r]);
    int32_t n = c.count;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const Vec score = floats_of(sums + v * W) * scale;
        const Vec margin = fma(error, load(norms + v * W), norm * load(norms + NR + v * W));
        const Vec upper = score + margin;
        const uint32_t beat = not_le(upper, threshold) & bits >> (v * W) & low_bits(W);
        compress_floats(c.lower + n, beat, score - margin);
        n += append(c.upper + n, c.indices + n, beat, upper, base + v * W);
    }
    return n - c.count;
}

// select_rows by bounds; false, and nothing written, where they leave too many candidates.
template <class T, class Tile>
bool select_rows_by_bounds(const SelectParams& p, int64_t b, int64_t head, Range queries,
                           const uint32_t* panels_of_head, void* memory, Survivors& survivors) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t kv_head = head / (p.heads / p.kv_heads), rows = queries.end - queries.begin;
    BoundedRows<T, Tile> work{
        p,
        static_cast<const T*>(p.query) + b * p.query_strides.b + head * p.query_strides.h,
        static_cast<const T*>(p.key) + b * p.key_strides.b + kv_head * p.key_strides.h,
        panels_of_head,
        scratch,
        survivors};
    const int64_t panel_words = rounded_panel_words(p.head_dim);
    Bounded candidates[kBlockRows];
    Visible visible[kBlockRows];
    RowFacts facts[kRowGroups];
    alignas(64) int32_t tile[MR * NR];
    alignas(64) int32_t bound[W];
    uint32_t beats[MR];
    uint32_t scored_rows[kRowGroups] = {};
    Range needed[kRowGroups], inner[kRowGroups], span{INT64_MAX, 0};

    for (int g = 0; g < kRowGroups; ++g) {
        needed[g] = {INT64_MAX, 0};
        inner[g] = {0, INT64_MAX};
        for (int r = 0; r < W; ++r) facts[g].threshold[r] = __builtin_inff();
        for (int r = 0; r < MR; ++r) {
            const int64_t i = g * MR + r;
            Bounded& c = candidates[i];
            c = {scratch.take<float>(work.buffer), scratch.take<float>(work.buffer),
                 scratch.take<int32_t>(work.buffer), 0, 0};
            if (i >= rows) continue;
            const Visible v = visible[i] = visible_to(p, b, head, queries.begin + i);
            c.keep = static_cast<int32_t>(p.top_k - forced_count(v));
            if (c.keep <= 0 || v.end <= v.sink_end || (!v.mask && v.end - v.sink_end <= c.keep)) continue;
            scored_rows[g] |= 1u << r;
            facts[g].threshold[r] = -__builtin_inff();
            needed[g] = {minimum(needed[g].begin, v.sink_end), maximum(needed[g].end, v.end)};
            inner[g] = {maximum(inner[g].begin, v.sink_end), minimum(inner[g].end, v.end)};
        }
        if (p.rule.mask) inner[g].end = 0;
        if (needed[g].end == 0) continue;
        span = {minimum(span.begin, needed[g].begin / NR), maximum(span.end, (needed[g].end + NR - 1) / NR)};
        if (!work.prepare(g, queries.begin + g * MR, minimum<int64_t>(MR, rows - g * MR), scored_rows[g],
                          facts[g]))
            return false;
    }

    for (int64_t n = span.begin; n < span.end; ++n) {
        const int64_t base = n * NR;
        uint32_t* panel = const_cast<uint32_t*>(panels_of_head) + n * panel_words;
        const PanelFacts& keys_facts = *facts_of(panel, work.word_count);
        const float* key_norms = norms_of(panel, work.word_count);
        for (int g = 0; g < kRowGroups; ++g) {
            if (base >= needed[g].end || base + NR <= needed[g].begin) continue;
            thresholds(facts[g], keys_facts, bound);
            uint32_t beaten = rounded_tile(tile, work.queries + g * work.word_count * MR, panel,
                                           work.word_count, bound, beats) &
                              scored_rows[g];
            const bool all_lanes = base >= inner[g].begin && base + NR <= inner[g].end;
            for (; beaten; beaten &= beaten - 1) {
                const int r = __builtin_ctz(beaten), i = g * MR + r;
                uint32_t bits = beats[r];
                if (!all_lanes) bits &= candidate_bits(visible[i], base, NR);
                Bounded& c = candidates[i];
                const int32_t count = c.count =
                    c.count + append_bounded(c, tile + r * NR, bits, facts[g], r, keys_facts, key_norms,
                                             static_cast<int32_t>(base));
                if (count <= work.full) continue;
                facts[g].threshold[r] = prune(c, facts[g].threshold[r], work.keys);
                if (c.count > work.full - work.full / 4) return false;
            }
        }
    }

    int32_t* out = p.indices + ((b * p.rule.groups + head) * p.query_length + queries.begin) * p.top_k;
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        Bounded& c = candidates[i];
        const Visible& v = visible[i];
        if (scored_rows[i / MR] >> (i % MR) & 1) {
            work.finish(c, facts[i / MR].threshold[i % MR], queries.begin + i);
        } else if (c.keep > 0) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
    return true;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
