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

// A row whose bounds leave more than three quarters of its buffer is given up.
SPARSE_ATTN_INLINE int64_t bounded_capacity(int64_t keep) {
    return round_up(2 * keep + maximum<int64_t>(keep, 128), W);
}

// A row group, a lane per row. A rounded score is off by at most half of `width`, whichever the key.
struct alignas(64) RowFacts {
    float best[W];       // at least `keep` of the candidates reach it
    float threshold[W];  // best − width: what does not beat it is out; +∞ for rows without candidates
    float width[W];
    float scale[W], inverse[W];
    float norm[W], error[W];  // of the rounded row (or larger), of its rounding
};

// Drops what the bounds rule out, keeping the order.
inline void prune(Candidates& c, RowFacts& rows, int r, int32_t* keys) {
    if (c.count < c.keep) return;
    const int32_t padded = order_all(c.scores, c.count, keys);
    const Cut cut = find_cut(keys, c.count, padded, c.keep, c.keep + c.keep / 8, order_of(rows.best[r]));
    rows.best[r] = float_of_order(cut.low);
    rows.threshold[r] = rows.best[r] - rows.width[r];
    const Vec threshold = broadcast(rows.threshold[r]);
    int32_t n = 0;
    for (int32_t i = 0; i < c.count; i += W) {
        const uint32_t bits =
            ~not_le(threshold, load(c.scores + i)) & low_bits(minimum<int32_t>(W, c.count - i));
        n += compress_to(c.scores + n, c.indices + n, bits, c.scores + i, c.indices + i);
    }
    c.count = n;
}

SPARSE_ATTN_INLINE int64_t bounds_scratch_bytes(const SelectParams& p, int64_t column) {
    const int64_t buffer = bounded_capacity(p.top_k) + kSlack;
    return kBlockRows * (buffer * 8 + 128) + buffer * 12 + pair_words(p.head_dim) * (kBlockRows + W) * 4 +
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
    void finish(Candidates& c, RowFacts& rows, int r, int64_t row) {
        ++survivors.rows;
        survivors.budget += c.keep;
        prune(c, rows, r, keys);
        survivors.kept += c.count;
        if (c.count <= c.keep) return;
        // At most `keep` candidates reach the cut: one that is above it by the width is chosen, whatever the
        // exact scores are.
        const int32_t padded = order_all(c.scores, c.count, keys);
        const Cut cut = find_cut(keys, c.count, padded, maximum(1, c.keep - c.keep / 8), c.keep);
        const float sure =
            cut.at_least <= c.keep ? float_of_order(cut.low) + rows.width[r] : __builtin_inff();
        int32_t n = 0;
        for (int32_t i = 0; i < c.count; i += W) {
            const uint32_t open =
                not_le(broadcast(sure), load(c.scores + i)) & low_bits(minimum<int32_t>(W, c.count - i));
            for (uint32_t left = open; left; left &= left - 1) places[n++] = i + __builtin_ctz(left);
        }
        survivors.scored += n;
        int32_t* unsure = keys;
        for (int32_t i = 0; i < n; ++i) unsure[i] = c.indices[places[i]];
        const Strides& s = p.query_strides;
        Tile::template pack_column<true>(exact_query, 1, query + row * s.t, s.d, p.head_dim, words<Tile>(p),
                                         sign_of(p.rule.scale));
        exact_scores<T, Tile>(p, exact_query, key, unsure, n, scores);
        for (int32_t i = 0; i < c.count; ++i) c.scores[i] = __builtin_inff();
        for (int32_t i = 0; i < n; ++i) c.scores[places[i]] = scores[i];
        keep_best<false>(c, keys);
    }
};

// The sums above which a key of a panel beats the threshold of its row.
SPARSE_ATTN_INLINE void thresholds(const RowFacts& rows, const PanelFacts& panel, int32_t* bound) {
    const Vec sums = load(rows.threshold) * load(rows.inverse) * broadcast(panel.inverse);
    const Vec most = broadcast(0x1.fffffep30f);
    // Never above the whole number below.
    const Vec whole = round_even(max(sums, zero() - most) - broadcast(0.5f));
    store_whole(bound, zero() - max(zero() - whole, zero() - most));
}

// How wide the bounds of each row are, by the largest norms of the keys that it may see.
inline void set_width(RowFacts& rows, float key_norm, float key_error) {
    const Vec margin = fma(load(rows.error), broadcast(key_norm), load(rows.norm) * broadcast(key_error));
    store(rows.width, margin + margin);
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
    Candidates candidates[kBlockRows];
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
        for (int r = 0; r < W; ++r) {
            facts[g].best[r] = -__builtin_inff();
            facts[g].threshold[r] = __builtin_inff();
        }
        for (int r = 0; r < MR; ++r) {
            const int64_t i = g * MR + r;
            Candidates& c = candidates[i];
            c = {scratch.take<float>(work.buffer), scratch.take<int32_t>(work.buffer), 0, 0};
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

    const auto panel_at = [&](int64_t n) {
        return const_cast<uint32_t*>(panels_of_head) + n * rounded_panel_words(p.head_dim);
    };
    float key_norm = 0.0f, key_error = 0.0f;
    for (int64_t n = span.begin; n < span.end; ++n) {
        const PanelFacts& panel = *facts_of(panel_at(n), work.word_count);
        key_norm = maximum(key_norm, panel.norm);
        key_error = maximum(key_error, panel.error);
    }
    if (!(key_norm <= 4 * kLargest)) return false;
    for (int g = 0; g < kRowGroups; ++g)
        if (needed[g].end > 0) set_width(facts[g], key_norm, key_error);

    for (int64_t n = span.begin; n < span.end; ++n) {
        const int64_t base = n * NR;
        uint32_t* panel = panel_at(n);
        const PanelFacts& keys_facts = *facts_of(panel, work.word_count);
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
                Candidates& c = candidates[i];
                const Vec scale = broadcast(facts[g].scale[r] * keys_facts.scale);
                int32_t count = c.count;
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    count +=
                        append(c.scores + count, c.indices + count, bits >> (v * W) & low_bits(W),
                               floats_of(tile + r * NR + v * W) * scale, static_cast<int32_t>(base + v * W));
                c.count = count;
                if (count <= work.full) continue;
                prune(c, facts[g], r, work.keys);
                if (c.count > work.full - work.full / 4) return false;
            }
        }
    }

    int32_t* out = p.indices + ((b * p.rule.groups + head) * p.query_length + queries.begin) * p.top_k;
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        Candidates& c = candidates[i];
        const Visible& v = visible[i];
        if (scored_rows[i / MR] >> (i % MR) & 1) {
            work.finish(c, facts[i / MR], static_cast<int>(i % MR), queries.begin + i);
        } else if (c.keep > 0) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
    return true;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
