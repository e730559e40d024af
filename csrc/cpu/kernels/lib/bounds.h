// Exact selection from rounded scores. With rows q, k in float32 and their rounded twins q̂, k̂
//
//   |q·k − q̂·k̂| ≤ ‖q − q̂‖·‖k‖ + ‖q̂‖·‖k − k̂‖ = E                              (Cauchy–Schwarz)
//
// up to the same constant for all keys of a row (keys are shifted, which moves all scores of a query alike).
// Of q̂·k̂ the whole number s of units u below it is kept, 16 bits: the exact score lies in [s·u − E, (s + 1)·u
// + E), or, of bytes, whose sum is rounded once more, in [s·u − u / 2 − E, (s + 3 / 2)·u + E). With w = ⌈2E /
// u⌉
// + 1, of bytes + 2,
//
//   s ≤ t − w, where K keys reach t:                    they all score higher, ties excluded: not chosen
//   s ≥ c + w − 1, where at most K keys reach c:        higher than all others but those: chosen
//
// What is left is ranked by the exact score, computed as the full product computes it: the selection has the
// same bits, in whatever order keys are visited.
#pragma once

#include "rounded_tile.h"
#include "rows.h"
#include "score_rows.h"
#include "select_shared.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// A row whose bounds leave more than three quarters of its buffer is given up.
template <class Kind>
SPARSE_ATTN_INLINE int64_t bounded_capacity(int64_t keep) {
    return round_up((Kind::kBits == 16 ? 2 : 6) * keep + maximum<int64_t>(keep, 128), 64);
}
constexpr int32_t kMany = 16;     // open candidates
constexpr int64_t kBehind = 192;  // room that compression writes to
// Groups of keys whose maxima bound the K-th best.
SPARSE_ATTN_INLINE int64_t maxima_groups(int64_t keep) {
    return round_up(4 * keep, 8 * Shorts::N);
}
// Keys whose scores are kept at a time: those of a block of queries fit the second-level cache.
SPARSE_ATTN_INLINE int64_t chunk_keys(const SelectParams& p) {
    const int64_t most = maximum<int64_t>(4096, round_up(maxima_groups(p.top_k), 1024));
    return minimum(most, round_up(p.key_length, 64));
}
// An odd number of cache lines: rows side by side must not fall into one set.
SPARSE_ATTN_INLINE int64_t score_stride(const SelectParams& p) {
    return round_up(chunk_keys(p), 64) + 32;
}

// A row group, a lane per row.
struct alignas(64) RowFacts {
    float scale[W];
    float norm[W], error[W];  // of the rounded row (or larger), of its rounding
    int32_t width[W];         // w
    float slack[W];           // what the sum of a score is off by, at most
};

// What the rows of a task have come to.
struct BoundedRow {
    int32_t* places;  // [capacity + slack]: candidates, ascending
    int16_t* scores;  // [capacity + slack]
    int16_t* maxima;  // [groups]
    int32_t count;
    int32_t keep;
    int32_t reached;  // at least `keep` keys reach it, or kClosed
};

template <class Kind>
SPARSE_ATTN_INLINE int64_t bounds_scratch_bytes(const SelectParams& p, int64_t column) {
    const int64_t buffer = bounded_capacity<Kind>(p.top_k) + kBehind;
    const int64_t row = buffer * 6 + maxima_groups(p.top_k) * 2 + score_stride(p) * 2 + 256;
    return kBlockRows * row + buffer * 24 + rounded_words<Kind>(p.head_dim) * (kBlockRows + W) * 4 +
           p.head_dim * W * 4 + column * 4 + round_up(p.head_dim, W) * 4 + 2048;
}

template <class T, class Tile, class Kind>
struct BoundedRows {
    const SelectParams& p;
    const T *query, *key;  // the head's rows
    Scratch& scratch;
    const int64_t word_count, buffer, groups, stride;
    const int32_t full;
    int32_t *keys, *unsure, *chosen, *few;
    float *exact, *scores_of_few;
    uint32_t* queries;  // [kRowGroups][words][MR]
    uint32_t* wide;     // [words][W]
    float* columns;     // [D][W]
    float* exact_query;
    float* plain_query;  // [D], zeros up to whole vectors
    int16_t* rows;       // [kBlockRows][stride]: scores of a chunk
    Survivors& survivors;

    BoundedRows(const SelectParams& p_, const T* query_, const T* key_, Scratch& s, Survivors& survivors_)
        : p(p_),
          query(query_),
          key(key_),
          scratch(s),
          word_count(rounded_words<Kind>(p.head_dim)),
          buffer(bounded_capacity<Kind>(p.top_k) + kBehind),
          groups(maxima_groups(p.top_k)),
          stride(score_stride(p)),
          full(static_cast<int32_t>(bounded_capacity<Kind>(p.top_k))),
          keys(s.take<int32_t>(buffer)),
          unsure(s.take<int32_t>(buffer)),
          chosen(s.take<int32_t>(buffer)),
          few(s.take<int32_t>(buffer)),
          exact(s.take<float>(buffer)),
          scores_of_few(s.take<float>(buffer)),
          queries(s.take<uint32_t>(word_count * kBlockRows)),
          wide(s.take<uint32_t>(word_count * W)),
          columns(s.take<float>(p.head_dim * W)),
          exact_query(s.take<float>(words<Tile>(p))),
          plain_query(s.take<float>(round_up(p.head_dim, W))),
          rows(s.take<int16_t>(kBlockRows * stride)),
          survivors(survivors_) {}

    void start(BoundedRow& row) {
        row = {scratch.take<int32_t>(buffer),
               scratch.take<int16_t>(buffer),
               scratch.take<int16_t>(groups),
               0,
               0,
               kClosed};
    }

    // Rounds the rows [first, first + rows); false if one of `wanted` has no bounds.
    bool prepare(int g, int64_t first, int64_t count, uint32_t wanted, RowFacts& facts) {
        const Strides& s = p.query_strides;
        const Vec as_is = load_columns(columns, query + first * s.t, count, s.t, s.d, p.head_dim,
                                       sign_of(p.rule.scale), nullptr);
        rotate(columns, p.head_dim);
        float norms[W], sizes[W], inverse[W];
        store(norms, as_is);
        store(sizes, Kind::kBits == 16 ? as_is : largest_of_columns(columns, p.head_dim));
        constexpr float kWhole = Kind::kBits == 16 ? kWholeNorm : Kind::kMost;
        for (int r = 0; r < MR; ++r)
            if (wanted >> r & 1 && !(norms[r] >= kSmallest && norms[r] <= kLargest)) return false;
        for (int r = 0; r < W; ++r) {
            const bool usable = norms[r] >= kSmallest && norms[r] <= kLargest;
            facts.scale[r] = usable ? sizes[r] / kWhole : 1.0f;
            inverse[r] = usable ? kWhole / sizes[r] : 0.0f;
        }
        uint32_t* to = queries + g * word_count * MR;
        const RoundedNorms n =
            round_columns<Kind>(wide, W, columns, p.head_dim, load(facts.scale), load(inverse));
        // Of bytes 128 more than they are: the instruction wants them without a sign.
        constexpr uint32_t kMore = Kind::kBits == 16 ? 0 : 0x80808080u;
        for (int64_t w = 0; w < word_count; ++w)
            for (int r = 0; r < MR; ++r) to[w * MR + r] = wide[w * W + r] ^ kMore;
        store(facts.norm, max(n.norm + n.error, as_is));
        store(facts.error, n.error);
        return true;
    }

    // w of each row, by the largest norms of the keys that it may see.
    void set_width(RowFacts& facts, float key_norm, float key_error, float plain_norm, float unit) {
        for (int r = 0; r < MR; ++r) {
            facts.slack[r] = 2 * slack_of(p.head_dim) * facts.norm[r] * maximum(plain_norm, kSmallest);
            const float half = facts.error[r] * key_norm + facts.norm[r] * key_error;
            const float whole = 2.001f * half / (facts.scale[r] * unit);
            facts.width[r] =
                whole < 65536.0f ? static_cast<int32_t>(whole) + (Kind::kBits == 16 ? 2 : 3) : 65539;
        }
    }

    // Keeps the candidates that are above the bound.
    void keep_above(BoundedRow& row, int32_t bound) {
        close_tail(row.scores, row.count);
        int32_t n = 0;
        for (int32_t i = 0; i < row.count; i += 64) {
            uint64_t bits = bits_above(row.scores + i, all_shorts(to_short(bound)));
            for (; bits; bits &= bits - 1, ++n) {
                const int32_t from = i + __builtin_ctzll(bits);
                row.places[n] = row.places[from];
                row.scores[n] = row.scores[from];
            }
        }
        row.count = n;
    }

    // Takes the keys [first, first + n) with these scores, n a multiple of 64; false where too many are left.
    // `only`: the row has no others.
    bool take(BoundedRow& row, const int16_t* scores, int64_t n, int32_t first, int32_t width, int32_t guess,
              bool only) {
        const int32_t most = row.keep + row.keep / 8;
        const int32_t near = 1 + width / 16;  // a threshold so much too low leaves few keys more
        const bool small = only && n <= groups;
        if (!small) fold_maxima(row.maxima, groups, scores, n);
        row.reached = reached_by(small ? scores : row.maxima, small ? n : groups, row.keep, most, near,
                                 row.reached, guess)
                          .low;
        const int32_t before = row.count;
        for (bool searched = small;; searched = true) {
            row.count =
                places_above(row.places, before, full, scores, n, to_short(row.reached - width), first);
            if (row.count <= full) break;
            if (searched) return false;  // near-ties
            // Groups with many good keys each.
            row.reached = reached_by(scores, n, row.keep, most, near, row.reached, row.reached + 64).low;
        }
        for (int32_t i = before; i < row.count; ++i) row.scores[i] = scores[row.places[i] - first];
        if (only || row.count <= full / 2) return true;
        const int64_t padded = close_tail(row.scores, row.count);
        row.reached = reached_by(row.scores, padded, row.keep, most, near, row.reached, row.reached + 64).low;
        keep_above(row, row.reached - width);
        return row.count <= full - full / 4;
    }

    void pack_exact(int64_t at) {
        const Strides& s = p.query_strides;
        Tile::template pack_column<true>(exact_query, 1, query + at * s.t, s.d, p.head_dim, words<Tile>(p),
                                         sign_of(p.rule.scale));
    }

    // The exact best of the `open` candidates keys[i], in order: `unsure` is cut to them; returns how many.
    int32_t rank(int32_t open, int32_t keep, int64_t at) {
        survivors.scored += open;
        pack_exact(at);
        exact_scores<T, Tile>(p, exact_query, key, keys, open, exact);
        Candidates c{exact, unsure, open, keep};
        keep_best<false>(c, keys);
        return c.count;
    }

    // The same where many are open: by sums in the order in which a row is read, whose error is known, and
    // only of what these leave open by those in the order of the full product, which costs more.
    int32_t rank_many(int32_t open, int32_t keep, int64_t at, float slack) {
        const Strides& s = p.query_strides;
        load_padded(plain_query, query + at * s.t, p.head_dim, s.d);
        const auto dots = [&]<int D>() {
            Rows<T, D>{key, p.key_strides.t, p.head_dim}.dots(plain_query, keys, open, sign_of(p.rule.scale),
                                                              exact);
        };
        if (p.head_dim == 64)
            dots.template operator()<64>();
        else if (p.head_dim == 128)
            dots.template operator()<128>();
        else
            dots.template operator()<0>();
        const int32_t padded = order_all(exact, open, chosen);
        const float cut = float_of_order(find_cut(chosen, open, padded, keep, keep).low);
        const Vec sure = broadcast(cut + 2 * slack), least = broadcast(cut - 2 * slack);
        // What is below goes, what is above scores higher than all others; `chosen` lists what is between.
        const Vec highest = broadcast(__builtin_inff());
        int32_t kept = 0, between = 0;
        for (int32_t i = 0; i < open; i += W) {
            const Vec score = load(exact + i);
            const uint32_t may = not_le(score, least) & low_bits(open - i), above = not_le(score, sure);
            for (uint32_t bits = may & ~above; bits; bits &= bits - 1)
                chosen[between++] = kept + __builtin_popcount(may & low_bits(__builtin_ctz(bits)));
            store(exact + i, where(above, highest, score));
            compress_to(keys + kept, may, keys + i);
            kept += compress_to(exact + kept, unsure + kept, may, exact + i, unsure + i);
        }
        if (kept == keep) return kept;
        survivors.scored += between;
        for (int32_t i = 0; i < between; ++i) few[i] = keys[chosen[i]];
        pack_exact(at);
        exact_scores<T, Tile>(p, exact_query, key, few, between, scores_of_few);
        for (int32_t i = 0; i < between; ++i) exact[chosen[i]] = scores_of_few[i];
        Candidates c{exact, unsure, kept, keep};
        keep_best<false>(c, keys);
        return c.count;
    }

    // The exact best of a row's candidates, in order; returns them.
    const int32_t* finish(BoundedRow& row, int32_t width, float slack, int64_t at) {
        ++survivors.rows;
        survivors.budget += row.keep;
        if (row.count <= row.keep) {
            survivors.kept += row.count;
            return row.places;
        }
        const int64_t padded = close_tail(row.scores, row.count);
        const Reached cut =
            reached_by(row.scores, padded, row.keep, row.keep, 8 + width / 16, row.reached, row.reached + 64);
        // What no more than `keep` reach, and so what is chosen and what is out.
        const int32_t few = cut.count <= row.keep ? cut.low : cut.high + 1;
        const Shorts sure = all_shorts(to_short(few + width - 2)),
                     out = all_shorts(to_short(cut.low - width));
        int32_t kept = 0, open = 0;
        for (int32_t i = 0; i < row.count; i += 64) {
            const uint64_t left = bits_above(row.scores + i, out);
            kept += __builtin_popcountll(left);
            open += append_places(unsure + open, left & ~bits_above(row.scores + i, sure), i);
        }
        survivors.kept += kept;
        const bool all = kept <= row.keep;  // what is left is chosen
        if (!all) {
            for (int32_t i = 0; i < open; ++i) keys[i] = row.places[unsure[i]];
            const int32_t keep = row.keep - (kept - open);
            open = open > kMany ? rank_many(open, keep, at, slack) : rank(open, keep, at);
        }
        int32_t n = 0, used = 0;
        for (int32_t i = 0; i < row.count; i += 64) {
            uint64_t best = bits_above(row.scores + i, all ? out : sure);
            for (; !all && used < open && unsure[used] < i + 64; ++used)
                best |= uint64_t{1} << (unsure[used] - i);
            n += append_marked(chosen + n, best, row.places + i, minimum<int32_t>(64, row.count - i));
        }
        row.count = n;
        return chosen;
    }
};

// Closes the scores [begin, end) of a row.
SPARSE_ATTN_INLINE void close(int16_t* scores, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scores[i] = kClosed;
}

// Of the keys that stand from `first` on, which are [begin, end) of a row's candidates, closes those that its
// mask hides.
inline void close_masked(int16_t* scores, const Visible& v, int64_t first, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
        if (!allowed(v, j)) scores[j - first] = kClosed;
}

// select_rows by bounds; false, and nothing written, where they leave too many candidates.
template <class T, class Tile, class Kind>
bool select_rows_by_bounds(const SelectParams& p, int64_t b, int64_t head, Range queries,
                           const uint32_t* panels_of_head, void* memory, Survivors& survivors) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t kv_head = head / (p.heads / p.kv_heads), count = queries.end - queries.begin;
    BoundedRows<T, Tile, Kind> work{
        p, static_cast<const T*>(p.query) + b * p.query_strides.b + head * p.query_strides.h,
        static_cast<const T*>(p.key) + b * p.key_strides.b + kv_head * p.key_strides.h, scratch, survivors};
    BoundedRow rows[kBlockRows];
    Visible visible[kBlockRows];
    RowFacts facts[kRowGroups];
    uint32_t scored_rows[kRowGroups] = {};
    Range needed[kRowGroups], span{INT64_MAX, 0};  // of keys

    for (int g = 0; g < kRowGroups; ++g) {
        needed[g] = {INT64_MAX, 0};
        for (int r = 0; r < MR; ++r) {
            const int64_t i = g * MR + r;
            if (i >= count) continue;
            BoundedRow& row = rows[i];
            work.start(row);
            const Visible v = visible[i] = visible_to(p, b, head, queries.begin + i);
            row.keep = static_cast<int32_t>(p.top_k - forced_count(v));
            if (row.keep <= 0 || v.end <= v.sink_end || (!v.mask && v.end - v.sink_end <= row.keep)) continue;
            scored_rows[g] |= 1u << r;
            needed[g] = {minimum(needed[g].begin, v.sink_end), maximum(needed[g].end, v.end)};
        }
        if (needed[g].end == 0) continue;
        span = {minimum(span.begin, needed[g].begin), maximum(span.end, needed[g].end)};
        if (!work.prepare(g, queries.begin + g * MR, minimum<int64_t>(MR, count - g * MR), scored_rows[g],
                          facts[g]))
            return false;
    }

    const auto panel_at = [&](int64_t n) {
        return const_cast<uint32_t*>(panels_of_head) + n * rounded_panel_words<Kind>(p.head_dim);
    };
    float key_norm = 0.0f, key_error = 0.0f, plain_norm = 0.0f;
    int32_t exponent = -100;
    for (int64_t n = span.begin / NR; n * NR < span.end; ++n) {
        const PanelFacts& panel = *facts_of<Kind>(panel_at(n), work.word_count);
        key_norm = maximum(key_norm, panel.norm);
        key_error = maximum(key_error, panel.error);
        plain_norm = maximum(plain_norm, panel.plain_norm);
        exponent = maximum(exponent, panel.exponent);
    }
    if (!(key_norm <= 4 * kLargest)) return false;
    const int32_t least = least_shift<Kind>(p.head_dim);
    for (int g = 0; g < kRowGroups; ++g)
        if (needed[g].end > 0)
            work.set_width(facts[g], key_norm, key_error, plain_norm, power_of_two(exponent + least));

    const int64_t chunk = chunk_keys(p);
    int32_t guess = 0;
    for (int64_t first = span.begin / 64 * 64, last; first < span.end; first = last) {
        last = minimum(first + chunk, span.end);
        for (int64_t base = first / NR * NR; base < last; base += NR) {
            uint32_t* panel = panel_at(base / NR);
            const int shift =
                minimum(31, least + exponent - facts_of<Kind>(panel, work.word_count)->exponent);
            for (int g = 0; g < kRowGroups; ++g) {
                if (base >= needed[g].end || base + NR <= needed[g].begin) continue;
                rounded_tile<Kind>(work.rows + g * MR * work.stride + (base - first), work.stride,
                                   work.queries + g * work.word_count * MR, panel, work.word_count, shift);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const Visible& v = visible[i];
            const int64_t begin = maximum(v.sink_end, first), end = minimum(v.end, last);
            if (!(scored_rows[i / MR] >> (i % MR) & 1) || begin >= end) continue;
            int16_t* scores = work.rows + i * work.stride;
            const int64_t from = (begin - first) / 64 * 64, to = round_up(end - first, 64);
            close(scores, from, begin - first);
            close(scores, end - first, to);
            if (v.mask) close_masked(scores, v, first, begin, end);
            const bool only = v.sink_end >= first && v.end <= last;
            BoundedRow& row = rows[i];
            if (v.sink_end >= first && !(only && to - from <= work.groups)) close(row.maxima, 0, work.groups);
            if (!work.take(row, scores + from, to - from, static_cast<int32_t>(first + from),
                           facts[i / MR].width[i % MR], guess, only))
                return false;
            guess = row.reached;
        }
    }

    int32_t* out = p.indices + ((b * p.rule.groups + head) * p.query_length + queries.begin) * p.top_k;
    for (int64_t i = 0; i < count; ++i, out += p.top_k) {
        BoundedRow& row = rows[i];
        const Visible& v = visible[i];
        const int32_t* best = row.places;
        if (scored_rows[i / MR] >> (i % MR) & 1) {
            best =
                work.finish(row, facts[i / MR].width[i % MR], facts[i / MR].slack[i % MR], queries.begin + i);
        } else if (row.keep > 0) {
            for (int64_t j = v.sink_end; j < v.end; ++j) row.places[row.count++] = static_cast<int32_t>(j);
        }
        emit(out, p.top_k, v, best, row.count);
    }
    return true;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
