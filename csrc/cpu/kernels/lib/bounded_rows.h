// The candidates of a row of rounded scores, and their ranks: what bounds.h, which has the proof, does with
// the rows of a group.
#pragma once

#include "rounded_tile.h"
#include "rows.h"
#include "score_rows.h"
#include "select_shared.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// A row whose bounds leave more than three quarters of its buffer is given up.
template <class Kind>
SPARSE_ATTN_INLINE int64_t bounded_capacity(int64_t keep) {
    return round_up((Kind::kBits == kPairBits ? 2 : 6) * keep + maximum<int64_t>(keep, 128), 64);
}
constexpr int32_t kMany = 16;     // open candidates
constexpr int64_t kBehind = 192;  // room that compression writes to
// Groups of keys whose maxima bound the K-th best.
SPARSE_ATTN_INLINE int64_t maxima_groups(int64_t keep) {
    return round_up(4 * keep, 8 * Shorts::N);
}
// Row groups that are scored together, behind a first one that says what to expect: tiles are multiplied
// faster than panels come from the second-level cache. Where rows keep many keys their buffers would fill
// that cache.
template <class Kind>
SPARSE_ATTN_INLINE int groups_together(const SelectParams& p) {
    return kFloats<Kind> && p.top_k <= 256 ? 3 : 1;
}
// Keys whose scores are kept at a time: those of the rows fit the second-level cache.
template <class Kind>
SPARSE_ATTN_INLINE int64_t chunk_keys(const SelectParams& p) {
    const int64_t usual = groups_together<Kind>(p) > 1 ? 4096 : 16384;
    const int64_t most = maximum<int64_t>(usual, round_up(maxima_groups(p.top_k), 1024));
    return minimum(most, round_up(p.key_length, 64));
}
// An odd number of cache lines: rows side by side must not fall into one set.
SPARSE_ATTN_INLINE int64_t score_stride(int64_t chunk) {
    return round_up(chunk, 64) + 32;
}

// Of marks, a bit a key, and a word more than its keys need.
SPARSE_ATTN_INLINE int64_t mark_stride(int64_t chunk) {
    return round_up(chunk, 64) / NR + 64 / NR;
}

// A row group, a lane per row.
struct alignas(64) RowFacts {
    float scale[W];
    float norm[W], error[W];  // of the rounded row (or larger), of its rounding
    int32_t width[W];         // w
    float slack[W];           // what the sum of a score is off by, at most
};

// What the rows of a group have come to.
struct BoundedRow {
    int32_t* places;  // [capacity + slack]: candidates, ascending
    int16_t* scores;  // [capacity + slack]
    int32_t count;
    int32_t keep;
    int32_t reached;  // at least `keep` keys reach it, or kClosed
    int32_t bound;    // what tiles mark is above it
    int32_t guess;    // where the search for its K-th best begins
    Reached cut;      // of all its scores, where somebody looked for it; a count of 0: nobody did
};

template <class Kind>
SPARSE_ATTN_INLINE int64_t bounds_scratch_bytes(const SelectParams& p, int64_t column) {
    const int64_t buffer = bounded_capacity<Kind>(p.top_k) + kBehind;
    const int64_t chunk = chunk_keys<Kind>(p), rows = MR * groups_together<Kind>(p);
    const int64_t row =
        buffer * 6 + score_stride(chunk) * 2 + mark_stride(chunk) * sizeof(Marks) + NR * 2 + 512;
    return rows * row + buffer * 24 + maxima_groups(p.top_k) * 2 +
           rounded_words<Kind>(p.head_dim) * (kBlockRows + W) * 4 + p.head_dim * W * 4 + column * 4 +
           round_up(p.head_dim, W) * 4 + 2048;
}

template <class T, class Tile, class Kind>
struct BoundedRows {
    const SelectParams& p;
    const T *query, *key;  // the head's rows
    Scratch& scratch;
    const int64_t word_count, buffer, groups, chunk, together;
    const int32_t full;
    int32_t *keys, *unsure, *chosen, *few;
    float *exact, *scores_of_few;
    uint32_t* queries;  // [kRowGroups][words][MR], of tiles [kRowGroups][MR][words]
    uint32_t* wide;     // [words][W]
    float* columns;     // [D][W]
    float* exact_query;
    float* plain_query;  // [D], zeros up to whole vectors
    int16_t* maxima;     // [groups]
    int16_t* bounds;     // [rows][NR]
    GroupScores scores;  // of a chunk
    Survivors& survivors;

    BoundedRows(const SelectParams& p_, const T* query_, const T* key_, Scratch& s, Survivors& survivors_)
        : p(p_),
          query(query_),
          key(key_),
          scratch(s),
          word_count(rounded_words<Kind>(p.head_dim)),
          buffer(bounded_capacity<Kind>(p.top_k) + kBehind),
          groups(maxima_groups(p.top_k)),
          chunk(chunk_keys<Kind>(p)),
          together(groups_together<Kind>(p)),
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
          maxima(s.take<int16_t>(groups)),
          bounds(s.take<int16_t>(together * MR * NR)),
          scores{s.take<int16_t>(together * MR * score_stride(chunk)), score_stride(chunk), bounds,
                 s.take<Marks>(together * MR * mark_stride(chunk)), mark_stride(chunk)},
          survivors(survivors_) {}

    void start(BoundedRow& row) {
        row.places = scratch.take<int32_t>(buffer);
        row.scores = scratch.take<int16_t>(buffer);
    }

    // Rounds the rows [first, first + rows) for keys of at most such a norm; false if one of `wanted` has no
    // bounds.
    bool prepare(int g, int64_t first, int64_t count, uint32_t wanted, float key_norm, RowFacts& facts) {
        const Strides& s = p.query_strides;
        const Vec as_is = load_columns(columns, query + first * s.t, count, s.t, s.d, p.head_dim,
                                       sign_of(p.rule.scale), nullptr);
        if constexpr (!kFloats<Kind>) rotate(columns, p.head_dim);
        float norms[W], sizes[W], inverse[W];
        store(norms, as_is);
        store(sizes, Kind::kBits == kPairBits ? as_is : largest_of_columns(columns, p.head_dim));
        constexpr float kWhole = Kind::kBits == kPairBits ? kWholeNorm : Kind::kMost;
        for (int r = 0; r < MR; ++r)
            if (wanted >> r & 1 && !(norms[r] >= kSmallest && norms[r] <= kLargest)) return false;
        for (int r = 0; r < W; ++r) {
            const bool usable = norms[r] >= kSmallest && norms[r] <= kLargest;
            if constexpr (kFloats<Kind>) {
                // A power of two, which rounds nothing, that keeps scores within what 16 bits hold.
                int exponent = 0;
                __builtin_frexpf(norms[r] * maximum(key_norm, kSmallest) / Kind::kMost, &exponent);
                facts.scale[r] = usable ? power_of_two(exponent) : 1.0f;
                inverse[r] = usable ? power_of_two(-exponent) : 0.0f;
            } else {
                facts.scale[r] = usable ? sizes[r] / kWhole : 1.0f;
                inverse[r] = usable ? kWhole / sizes[r] : 0.0f;
            }
        }
        uint32_t* to = queries + g * word_count * MR;
        const RoundedNorms n =
            round_columns<Kind>(wide, W, columns, p.head_dim, load(facts.scale), load(inverse));
        constexpr uint32_t kMore = Kind::kBits == kByteBits ? kQueryFlip : 0;
        for (int64_t w = 0; w < word_count; ++w)
            for (int r = 0; r < MR; ++r)
                to[kFloats<Kind> ? r * word_count + w : w * MR + r] = wide[w * W + r] ^ kMore;
        if constexpr (Kind::kBits == kByteBits) pair_words(to, MR, word_count);
        store(facts.norm, max(n.norm + n.error, as_is));
        store(facts.error, n.error);
        return true;
    }

    static SPARSE_ATTN_INLINE int32_t near_of(int32_t width) { return 8 + width / 16; }

    // w of each row, by the largest norms of the keys that it may see.
    void set_width(RowFacts& facts, float key_norm, float key_error, float plain_norm, float unit) {
        for (int r = 0; r < MR; ++r) {
            facts.slack[r] = 2 * slack_of(p.head_dim) * facts.norm[r] * maximum(plain_norm, kSmallest);
            const float half = facts.error[r] * key_norm + facts.norm[r] * key_error;
            const float whole = 2.001f * half / (facts.scale[r] * unit);
            facts.width[r] =
                whole < 65536.0f ? static_cast<int32_t>(whole) + (Kind::kBits == kByteBits ? 3 : 2) : 65539;
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

    // Takes of the keys [begin, end) of a chunk those that the tiles marked. False, and nothing taken, where
    // these need not be all that come near the K-th best.
    bool take_marked(BoundedRow& row, const int16_t* scores, const Marks* marked, int64_t begin, int64_t end,
                     int32_t first, int32_t width) {
        if (row.bound >= 32767) return false;
        const int32_t before = row.count;
        row.count = places_marked(row.places, before, full, marked, begin, end, first);
        if (row.count <= full) {
            for (int32_t i = before; i < row.count; ++i) row.scores[i] = scores[row.places[i] - first];
            if (row.reached > kClosed) return true;  // the bound comes from what reaches it
            if (row.count >= row.keep) {
                const int64_t padded = close_tail(row.scores, row.count);
                row.cut = reached_by(row.scores, padded, row.keep, row.keep, near_of(width), row.bound + 1,
                                     row.guess);
                if (row.cut.low - width >= row.bound) {
                    row.reached = row.cut.low;
                    return true;
                }
            }
        }
        row.count = before;
        row.cut.count = 0;
        return false;
    }

    // The same of all keys [first, first + n) with these scores, n a multiple of 64; false where too many are
    // left. `only`: the row has no others.
    bool take(BoundedRow& row, const int16_t* scores, int64_t n, int32_t first, int32_t width, bool only) {
        const int32_t most = row.keep + row.keep / 8;
        const int32_t near = 1 + width / 16;  // a threshold so much too low leaves few keys more
        const bool small = only && n <= groups;
        if (!small) {
            for (int64_t i = 0; i < groups; ++i) maxima[i] = kClosed;
            fold_maxima(maxima, groups, scores, n);
        }
        row.reached = reached_by(small ? scores : maxima, small ? n : groups, row.keep, most, near,
                                 row.reached, row.guess)
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
        return true;
    }

    // Cuts what a row has gathered where it is much; false where it stays much.
    bool trim(BoundedRow& row, int32_t width) {
        if (row.count <= full / 2) return true;
        const int32_t most = row.keep + row.keep / 8, near = 1 + width / 16;
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

    void dot_products(const int32_t* rows_of, int32_t n, int64_t at, float* to) {
        const Strides& s = p.query_strides;
        load_padded(plain_query, query + at * s.t, p.head_dim, s.d);
        const auto dots = [&]<int D>() {
            Rows<T, D>{key, p.key_strides.t, p.head_dim}.dots(plain_query, rows_of, n, sign_of(p.rule.scale),
                                                              to);
        };
        if (p.head_dim == 64)
            dots.template operator()<64>();
        else if (p.head_dim == 128)
            dots.template operator()<128>();
        else
            dots.template operator()<0>();
    }

    // The same where many are open: by sums in the order in which a row is read, whose error is known, and
    // only of what these leave open by those in the order of the full product, which costs more.
    int32_t rank_many(int32_t open, int32_t keep, int64_t at, float slack) {
        dot_products(keys, open, at, exact);
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

    // The best of the keys row.places[0, n), of whom `keep` or more there are, in order, and what attention
    // makes of them first: their sums in the order in which a row is read.
    const int32_t* rank_with_logits(BoundedRow& row, int32_t n, int64_t at, float slack, float* logits) {
        dot_products(row.places, n, at, exact);
        if (n == row.keep) {
            memcpy(logits, exact, static_cast<size_t>(n) * 4);
            return row.places;
        }
        const int32_t padded = order_all(exact, n, chosen);
        const float cut = float_of_order(find_cut(chosen, n, padded, row.keep, row.keep).low);
        const Vec sure = broadcast(cut + 2 * slack), least = broadcast(cut - 2 * slack);
        int32_t kept = 0, between = 0;
        for (int32_t i = 0; i < n; i += W) {
            const Vec score = load(exact + i);
            const uint32_t may = not_le(score, least) & low_bits(n - i), above = not_le(score, sure);
            for (uint32_t bits = may & ~above; bits; bits &= bits - 1)
                unsure[between++] = kept + __builtin_popcount(may & low_bits(__builtin_ctz(bits)));
            kept += compress_to(exact + kept, keys + kept, may, exact + i, row.places + i);
        }
        if (kept > row.keep) {
            survivors.scored += between;
            for (int32_t i = 0; i < between; ++i) few[i] = keys[unsure[i]];
            pack_exact(at);
            exact_scores<T, Tile>(p, exact_query, key, few, between, scores_of_few);
            Candidates c{scores_of_few, unsure, between, row.keep - (kept - between)};
            for (int32_t i = 0; i < between; ++i) few[i] = unsure[i];
            keep_best<false>(c, chosen);
            // `few` are the places of all that were unsure, `unsure` of those that stay.
            int32_t left = 0, seen = 0, stays = 0;
            for (int32_t i = 0; i < kept; ++i) {
                if (seen < between && few[seen] == i) {
                    ++seen;
                    if (stays == c.count || unsure[stays] != i) continue;
                    ++stays;
                }
                keys[left] = keys[i];
                exact[left++] = exact[i];
            }
        }
        memcpy(logits, exact, static_cast<size_t>(row.keep) * 4);
        return keys;
    }

    // The exact best of a row's candidates, in order; returns them. Where `logits` are wanted and the row's
    // keys have any, they are written.
    const int32_t* finish(BoundedRow& row, int32_t width, float slack, int64_t at, float* logits) {
        ++survivors.rows;
        survivors.budget += row.keep;
        if (row.count <= row.keep) {
            survivors.kept += row.count;
            return row.places;
        }
        const int64_t padded = close_tail(row.scores, row.count);
        Reached cut = row.cut;
        if (cut.count == 0)
            cut = reached_by(row.scores, padded, row.keep, row.keep, near_of(width), row.reached,
                             row.reached + 64);
        row.reached = cut.low;
        if (logits) {
            const Shorts out = all_shorts(to_short(cut.low - width));
            int32_t n = 0;
            for (int32_t i = 0; i < row.count; i += 64)
                n += append_marked(row.places + n, bits_above(row.scores + i, out), row.places + i,
                                   minimum<int32_t>(64, row.count - i));
            survivors.kept += n;
            row.count = row.keep;
            return rank_with_logits(row, n, at, slack, logits);
        }
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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
