// The K-th best of a row of scores that stands in memory, by counting.
//
// How many scores reach a value is one pass of comparisons over the row. A guess (as far from the mean, in
// standard deviations, as it was in the row before) and a few steps of interpolation leave some tens of
// scores between two values; those are ordered exactly. The result is a function of the scores alone, however
// good the guess.
#pragma once

#include "candidates.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kFewScores = 64;

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

// All scores that reach the key were chosen, but for the last `excess` of those that are equal to it.
struct Threshold {
    int32_t key;
    int64_t excess;
};

// Of n > keep > 0 scores. `few` and `keys` are scratch of kFewScores + 2 vectors each.
inline Threshold find_threshold(const float* scores, int64_t n, int64_t keep, ThresholdGuess& guess,
                                float* few, int32_t* few_indices, int32_t* keys) {
    constexpr int W = Vec::W;
    Vec high = broadcast(-__builtin_inff()), low = high, total = zero(), squares = zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec s = load(scores + i);
        high = max(s, high);
        low = max(zero() - s, low);
        total = total + s;
        squares = fma(s, s, squares);
    }
    float most = max_lane(high), least = -max_lane(low), sum_of = sum(total), square = sum(squares);
    for (; i < n; ++i) {
        const float s = scores[i];
        most = maximum(s, most);
        least = minimum(s, least);
        sum_of += s;
        square += s * s;
    }
    const float count = static_cast<float>(n), mean = sum_of / count;
    const float deviation = __builtin_sqrtf(maximum(square / count - mean * mean, 1e-30f));
    const bool usual = deviation - deviation == 0.0f && sum_of - sum_of == 0.0f;  // no NaN, no infinity

    // `low_key` is reached by at least `keep`, `high_key` by fewer.
    int64_t low_key = usual ? order_of(least) : INT32_MIN,
            high_key = usual ? order_of(most) + int64_t{1} : int64_t{1} << 31;
    int64_t at_low = n, at_high = 0;
    float x = mean + guess.distance * deviation, below_x = least, above_x = most;
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
    if (high_key - low_key == 1) return {static_cast<int32_t>(low_key), at_low - keep};

    const Vec bound = broadcast(below(low_key)), limit = broadcast(below(high_key));
    const bool any_above = high_key <= INT32_MAX;
    int64_t found = 0;
    for (i = 0; i < n; i += W) {
        const Vec s = i + W <= n ? load(scores + i) : load_n(scores + i, n - i);
        uint32_t bits = not_le(s, bound) & low_bits(minimum<int64_t>(W, n - i));
        if (any_above) bits &= ~not_le(s, limit);
        if (bits) found += append(few + found, few_indices + found, bits, s, 0);
    }
    const int32_t padded = order_all(few, static_cast<int32_t>(found), keys),
                  rank = static_cast<int32_t>(keep - at_high);
    const Cut cut = find_cut(keys, static_cast<int32_t>(found), padded, rank, rank);
    return {cut.low, cut.at_least - rank};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
