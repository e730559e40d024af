// The K-th best of a row of scores that stands in memory, by counting.
//
// How many scores reach a value is one pass of comparisons over the row. A guess (as far from the mean, in
// standard deviations, as it was in the row before) and a few steps of interpolation leave some tens of
// scores between two values; those are ordered exactly. The result is a function of the scores alone, however
// good the guess.
#pragma once

#include "candidates.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kFewScores = 16;

// Scores reach the key (order_of) exactly if they are not <= this.
SPARSE_ATTN_INLINE float below(int64_t key) {
    if (key == 0) return float_of_order(-2);  // −1 is the key of −0, which is 0
    return float_of_order(
        static_cast<int32_t>(minimum<int64_t>(key - 1, 0x7f800000)));  // past +inf NaN alone
}

SPARSE_ATTN_INLINE int64_t count_reaching(const float* scores, int64_t n, int64_t key) {
    const Vec bound = broadcast(below(key));
    int64_t count = 0, i = 0;
#pragma GCC unroll 4
    for (; i + Vec::W <= n; i += Vec::W) count += __builtin_popcount(not_le(load(scores + i), bound));
    if (i < n) count += __builtin_popcount(not_le(load_n(scores + i, n - i), bound) & low_bits(n - i));
    return count;
}

// What one row teaches the next.
struct ThresholdGuess {
    float distance = 0.0f, density = 0.3f;  // from the mean, and of scores there; in standard deviations
};

// All scores that reach the key were chosen, but for the last `excess` of those that are equal to it. `best`
// is the largest of all; skips NaN.
struct Threshold {
    int32_t key;
    int64_t excess;
    float best;
};

SPARSE_ATTN_INLINE float largest_of(const float* scores, int64_t n) {
    constexpr int W = Vec::W;
    Vec top = broadcast(-__builtin_inff());
    int64_t i = 0;
    for (; i + W <= n; i += W) top = max(load(scores + i), top);
    if (i < n) top = max(where(low_bits(n - i), load_n(scores + i, n - i), top), top);
    return max_lane(top);
}

struct Moments {
    float mean, deviation;
};
// Of long rows a quarter of the lines tells enough to begin with.
SPARSE_ATTN_INLINE Moments moments_of(const float* scores, int64_t n) {
    constexpr int W = Vec::W;
    constexpr int64_t kLine = 16;
    const int64_t step = n < 512 ? kLine : 4 * kLine;
    Vec total = zero(), squares = zero();
    float count = 0.0f;
    int64_t i = 0;
    for (; i + kLine <= n; i += step, count += kLine) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kLine; j += W) {
            const Vec s = load(scores + i + j);
            total = total + s;
            squares = fma(s, s, squares);
        }
    }
    float sum_of = sum(total), square = sum(squares);
    if (i == 0)
        for (; i < n; ++i, ++count) sum_of += scores[i], square += scores[i] * scores[i];
    const float mean = sum_of / count;
    return {mean, __builtin_sqrtf(maximum(square / count - mean * mean, 1e-30f))};
}

// Of n > keep > 0 scores. `few` and `keys` are scratch of kFewScores + 2 vectors each.
inline Threshold find_threshold(const float* scores, int64_t n, int64_t keep, ThresholdGuess& guess,
                                float* few, int32_t* few_indices, int32_t* keys) {
    constexpr int W = Vec::W;
    const Moments moments = moments_of(scores, n);
    const float count = static_cast<float>(n), mean = moments.mean, deviation = moments.deviation;
    const bool usual = deviation - deviation == 0.0f && mean - mean == 0.0f;

    // `low_key` is reached by at least `keep`, `high_key` by fewer.
    int64_t low_key = INT32_MIN, high_key = int64_t{1} << 31;
    int64_t at_low = n, at_high = 0;
    float x = mean + guess.distance * deviation, below_x = x, above_x = x;
    bool low_probed = false, high_probed = false;
    float margin = static_cast<float>(kFewScores) / 4;
    for (int step = 0; at_low - at_high > kFewScores && high_key - low_key > 1; ++step) {
        int64_t key = low_key + (high_key - low_key) / 2;
        if (usual && step < 12) key = clamp<int64_t>(order_of(x), low_key + 1, high_key - 1);
        const int64_t reach = count_reaching(scores, n, key);
        const float at = float_of_order(static_cast<int32_t>(key));
        if (reach >= keep)
            low_key = key, at_low = reach, below_x = at, low_probed = true;
        else
            high_key = key, at_high = reach, above_x = at, high_probed = true;
        const float over = static_cast<float>(at_low - keep), under = static_cast<float>(keep - at_high);
        if (low_probed && high_probed) {
            // The farther side is drawn near, to just beyond.
            const float aim = static_cast<float>(kFewScores) / 4;
            const float share = under > over ? over + minimum(aim, under / 2) : over - minimum(aim, over / 2);
            x = below_x + (above_x - below_x) * share / (over + under);
        } else {
            const float unit = deviation / (count * maximum(guess.density, 1e-3f));
            x = low_probed ? below_x + (over + margin) * unit : above_x - (under + margin) * unit;
            margin *= 4;
        }
    }
    if (usual && deviation > 0.0f) {
        const float width = (above_x - below_x) / deviation;
        guess.distance = (0.5f * (below_x + above_x) - mean) / deviation;
        if (low_probed && high_probed && width > 0.0f)
            guess.density = clamp(static_cast<float>(at_low - at_high) / (count * width), 1e-3f, 10.0f);
    }
    if (high_key - low_key == 1) return {static_cast<int32_t>(low_key), at_low - keep, largest_of(scores, n)};

    const Vec bound = broadcast(below(low_key)), limit = broadcast(below(high_key));
    const bool any_above = high_key <= INT32_MAX;
    int64_t found = 0, i = 0;
    Vec top = broadcast(-__builtin_inff());
    // A few vectors at a time: most of them have none, and what is unforeseen is rare.
    for (; i + 4 * W <= n; i += 4 * W) {
        uint32_t bits[4], any = 0;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const Vec s = load(scores + i + v * W);
            top = max(s, top);
            bits[v] = not_le(s, bound);
            if (any_above) bits[v] &= ~not_le(s, limit);
            any |= bits[v];
        }
        if (!any) continue;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            found += append(few + found, few_indices + found, bits[v], load(scores + i + v * W), 0);
    }
    for (; i < n; i += W) {
        const uint32_t lanes = low_bits(minimum<int64_t>(W, n - i));
        const Vec s = i + W <= n ? load(scores + i) : load_n(scores + i, n - i);
        top = max(where(lanes, s, top), top);
        uint32_t bits = not_le(s, bound) & lanes;
        if (any_above) bits &= ~not_le(s, limit);
        found += append(few + found, few_indices + found, bits, s, 0);
    }
    const int32_t padded = order_all(few, static_cast<int32_t>(found), keys),
                  rank = static_cast<int32_t>(keep - at_high);
    const Cut cut = find_cut(keys, static_cast<int32_t>(found), padded, rank, rank);
    return {cut.low, cut.at_least - rank, max_lane(top)};
}

// Cuts the buffer to its best `keep` scores, keeping the order, as candidates.h has it; returns the new
// threshold. `scratch` has kThresholdScratch numbers.
constexpr int64_t kThresholdScratch = 3 * (kFewScores + 2 * Vec::W);
inline float keep_best(Candidates& c, ThresholdGuess& guess, int32_t* scratch) {
    constexpr int W = Vec::W;
    if (c.keep == 0) {
        c.count = 0;
        return closed_threshold();
    }
    if (c.count < c.keep) return open_threshold();
    if (c.count == c.keep) {
        int32_t worst = INT32_MAX;
        for (int32_t i = 0; i < c.count; ++i) worst = minimum(worst, order_of(c.scores[i]));
        return worst == INT32_MAX ? closed_threshold() : float_of_order(worst);
    }
    int32_t* few = scratch + kFewScores + 2 * W;
    const Threshold t = find_threshold(c.scores, c.count, c.keep, guess, reinterpret_cast<float*>(scratch),
                                       few, few + kFewScores + 2 * W);
    const Vec bound = broadcast(below(t.key)), same = broadcast(float_of_order(t.key));
    const bool number = t.key != INT32_MAX;
    int64_t equal_left = 0;
    if (t.excess > 0)
        equal_left = count_reaching(c.scores, c.count, t.key) - t.excess -
                     (number ? count_reaching(c.scores, c.count, int64_t{t.key} + 1) : 0);
    int32_t n = 0;
    for (int32_t i = 0; i < c.count; i += W) {
        const Vec s = load(c.scores + i);  // whole vectors have room
        uint32_t bits = not_le(s, bound) & low_bits(c.count - i);
        if (t.excess > 0) {
            uint32_t equal = number ? bits & ~not_le(s, same) : bits;
            bits &= ~equal;
            while (__builtin_popcount(equal) > equal_left) equal ^= 0x80000000u >> __builtin_clz(equal);
            equal_left -= __builtin_popcount(equal);
            bits |= equal;
        }
        n += compress_to(c.scores + n, c.indices + n, bits, c.scores + i, c.indices + i);
    }
    c.count = n;
    return number ? float_of_order(t.key) : closed_threshold();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
