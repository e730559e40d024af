// One selection per row of scores: tiles are compared with each query's running threshold while they are hot.
#pragma once

#include "candidates.h"
#include "key_range.h"
#include "select_tile.h"
#include "threshold.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int kRowGroups = 4;  // row groups that share one pass over the panels
constexpr int kBlockRows = MR * kRowGroups;

// ---- what a query may see

// Keys [begin, sink_end) and [end, limit) are forced where the mask lets them, [sink_end, end) are
// candidates.
struct Visible {
    int64_t begin, sink_end, end, limit;
    const uint8_t* mask;  // its row, or null
    int64_t mask_stride;
};

SPARSE_ATTN_INLINE Visible visible_to(const SelectParams& p, int64_t b, int64_t group, int64_t query) {
    const Range keys = key_range(p.rule, b, query, p.key_length);
    Visible v;
    v.begin = keys.begin;
    v.limit = keys.end;
    v.sink_end = minimum(p.rule.sink_end(v.begin), v.limit);
    v.end = v.limit;
    if (p.rule.is_causal)
        v.end = clamp<int64_t>(p.rule.last_key(b, query) + 1 - p.rule.window, v.sink_end, v.limit);
    const Strides& s = p.rule.mask_strides;
    v.mask = p.rule.mask ? p.rule.mask + b * s.b + group * s.h + query * s.t : nullptr;
    v.mask_stride = s.d;
    return v;
}

SPARSE_ATTN_INLINE bool allowed(const Visible& v, int64_t key) {
    return !v.mask || v.mask[key * v.mask_stride];
}

SPARSE_ATTN_INLINE int64_t forced_count(const Visible& v) {
    if (!v.mask) return (v.sink_end - v.begin) + (v.limit - v.end);
    int64_t n = 0;
    for (int64_t j = v.begin; j < v.sink_end; ++j) n += allowed(v, j);
    for (int64_t j = v.end; j < v.limit; ++j) n += allowed(v, j);
    return n;
}

// Which of the `width` keys from `first` on are candidates.
SPARSE_ATTN_INLINE uint32_t candidate_bits(const Visible& v, int64_t first, int64_t width) {
    uint32_t bits = low_bits(clamp<int64_t>(v.end - first, 0, width)) &
                    ~low_bits(clamp<int64_t>(v.sink_end - first, 0, width));
    if (!v.mask || !bits) return bits;
    uint32_t open = 0;
    if (v.mask_stride == 1 && first + width <= v.limit) {
        for (int64_t i = 0; i < width; i += W) open |= nonzero_bytes(v.mask + first + i) << i;
    } else {
        for (uint32_t left = bits; left; left &= left - 1) {
            int64_t i = __builtin_ctz(left);
            if (allowed(v, first + i)) open |= 1u << i;
        }
    }
    return bits & open;
}

// Writes one query's row: the first keys, the chosen, the window; ascending, then −1.
SPARSE_ATTN_INLINE void emit(int32_t* row, int64_t slots, const Visible& v, const int32_t* chosen,
                             int64_t count) {
    int64_t n = 0;
    for (int64_t j = v.begin; j < v.sink_end; ++j)
        if (allowed(v, j)) row[n++] = static_cast<int32_t>(j);
    if (count > 0) memcpy(row + n, chosen, static_cast<size_t>(count) * 4);  // null where nothing was chosen
    n += count;
    for (int64_t j = v.end; j < v.limit; ++j)
        if (allowed(v, j)) row[n++] = static_cast<int32_t>(j);
    for (; n < slots; ++n) row[n] = -1;
}

// The ranges of keys from which a tile of queries may choose: all, or those of its blocks.
struct KeyRanges {
    const int32_t* blocks;  // or null
    int64_t count, size, length;

    SPARSE_ATTN_INLINE Range at(int64_t m) const {
        if (!blocks) return {0, length};
        const int64_t first = static_cast<int64_t>(blocks[m]) * size;
        if (first < 0 || first >= length) return {0, 0};
        return {first, minimum(first + size, length)};
    }
};

SPARSE_ATTN_INLINE KeyRanges key_ranges(const SelectParams& p, int64_t b, int64_t group, int64_t query) {
    if (!p.blocks) return {nullptr, 1, p.key_length, p.key_length};
    const Strides& s = p.blocks_strides;
    return {p.blocks + b * s.b + group * s.h + query / p.query_tile * s.t, p.block_slots, p.block_size,
            p.key_length};
}

// ---- the stream

SPARSE_ATTN_INLINE int64_t stream_scratch_bytes(const SelectParams& p) {
    const int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    return kBlockRows * (buffer * 8 + 128) + kThresholdScratch * 4 + 64;
}

// Selects for up to kBlockRows queries of one group. The scorer fills tiles of MR queries × NR keys:
//   prepare(g, first, rows)                         the row group's queries, before its first tile
//   score(g, panel, tile, threshold, beats) → rows  the scores, and which beat the threshold
template <class Scorer>
void stream_rows(const SelectParams& p, int64_t b, int64_t group, Range queries, Scratch& scratch,
                 Scorer& scorer) {
    const int64_t rows = queries.end - queries.begin;
    const int64_t buffer = candidate_capacity(p.top_k) + kSlack;
    const int32_t full = static_cast<int32_t>(candidate_capacity(p.top_k));
    int32_t* few = scratch.take<int32_t>(kThresholdScratch);
    ThresholdGuess guess;
    Candidates candidates[kBlockRows];
    Visible visible[kBlockRows];
    float threshold[kBlockRows];
    alignas(64) float tile[MR * NR];
    uint32_t beats[MR];
    bool scored[kBlockRows];
    uint32_t scored_rows[kRowGroups] = {};  // a bit per row; a NaN beats even the others' thresholds
    // Per row group: where any scored row needs tiles, and where all lanes of all its rows count.
    Range needed[kRowGroups], inner[kRowGroups];

    for (int g = 0; g < kRowGroups; ++g) {
        needed[g] = {INT64_MAX, 0};
        inner[g] = {0, INT64_MAX};
        for (int r = 0; r < MR; ++r) {
            int64_t i = g * MR + r;
            candidates[i] = {scratch.take<float>(buffer), scratch.take<int32_t>(buffer), 0, 0};
            scored[i] = false;
            threshold[i] = closed_threshold();
            if (i >= rows) continue;
            visible[i] = visible_to(p, b, group, queries.begin + i);
            Visible& v = visible[i];
            candidates[i].keep = static_cast<int32_t>(p.top_k - forced_count(v));
            scored[i] = candidates[i].keep > 0 && v.end > v.sink_end &&
                        (v.mask || p.blocks || v.end - v.sink_end > candidates[i].keep);
            if (!scored[i]) continue;
            scored_rows[g] |= 1u << r;
            threshold[i] = open_threshold();
            needed[g] = {minimum(needed[g].begin, v.sink_end), maximum(needed[g].end, v.end)};
            inner[g] = {maximum(inner[g].begin, v.sink_end), minimum(inner[g].end, v.end)};
        }
        if (p.rule.mask) inner[g].end = 0;
    }

    Range panels{INT64_MAX, 0};
    for (int g = 0; g < kRowGroups; ++g) {
        if (needed[g].end == 0) continue;
        panels = {minimum(panels.begin, needed[g].begin / NR),
                  maximum(panels.end, (needed[g].end + NR - 1) / NR)};
        scorer.prepare(g, queries.begin + g * MR, minimum<int64_t>(MR, rows - g * MR));
    }

    const KeyRanges ranges = key_ranges(p, b, group, queries.begin);
    for (int64_t m = 0; m < ranges.count; ++m) {
        const Range keys_of = ranges.at(m);
        const int64_t last_panel = minimum(panels.end, (keys_of.end + NR - 1) / NR);
        for (int64_t n = maximum(panels.begin, keys_of.begin / NR); n < last_panel; ++n) {
            const int64_t base = n * NR;
            const uint32_t inside = low_bits(clamp<int64_t>(keys_of.end - base, 0, NR)) &
                                    ~low_bits(clamp<int64_t>(keys_of.begin - base, 0, NR));
            for (int g = 0; g < kRowGroups; ++g) {
                if (base >= needed[g].end || base + NR <= needed[g].begin) continue;
                uint32_t beaten = scorer.score(g, n, tile, threshold + g * MR, beats) & scored_rows[g];
                const bool all_lanes = base >= inner[g].begin && base + NR <= inner[g].end;
                for (; beaten; beaten &= beaten - 1) {
                    const int r = __builtin_ctz(beaten), i = g * MR + r;
                    uint32_t bits = beats[r] & inside;
                    if (!all_lanes) bits &= candidate_bits(visible[i], base, NR);
                    if (!bits) continue;
                    Candidates& c = candidates[i];
                    int32_t count = c.count;
                    if ((bits & (bits - 1)) == 0) {
                        // The usual case once the threshold is good: one survivor.
                        const int lane = __builtin_ctz(bits);
                        c.scores[count] = tile[r * NR + lane];
                        c.indices[count++] = static_cast<int32_t>(base) + lane;
                    } else {
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v)
                            count +=
                                append(c.scores + count, c.indices + count, bits >> (v * W) & low_bits(W),
                                       load(tile + r * NR + v * W), static_cast<int32_t>(base + v * W));
                    }
                    c.count = count;
                    if (count > full) threshold[i] = keep_best(c, guess, few);
                }
            }
        }
    }

    int32_t* out = p.indices + ((b * p.rule.groups + group) * p.query_length + queries.begin) * p.top_k;
    for (int64_t i = 0; i < rows; ++i, out += p.top_k) {
        Candidates& c = candidates[i];
        Visible& v = visible[i];
        if (scored[i]) {
            keep_best(c, guess, few);
        } else if (c.keep > 0) {
            for (int64_t j = v.sink_end; j < v.end; ++j) c.indices[c.count++] = static_cast<int32_t>(j);
        }
        emit(out, p.top_k, v, c.indices, c.count);
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
