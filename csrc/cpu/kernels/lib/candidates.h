// The best keys seen so far by one query, while keys stream past in ascending order.
//
// A score that beats the running threshold is appended to a small buffer. When the buffer is full it is cut
// to the exact best `keep`, in place and in order, and the threshold becomes the worst of them. Because keys
// come in ascending order and only strictly better scores pass, ties go to the smaller index, and a plateau
// costs nothing.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct Candidates {
    float* scores;     // [capacity + slack]
    int32_t* indices;  // [capacity + slack]
    int32_t count;
    int32_t keep;  // the budget left after the forced keys
};

// Room behind the cursor: one panel may be appended before the next check, and compression writes whole
// vectors.
constexpr int kSlack = 64;

// The buffer's length: large enough that cutting is rare, small enough to stay in cache.
SPARSE_ATTN_INLINE int64_t candidate_capacity(int64_t keep) {
    return round_up(keep + maximum<int64_t>(keep, 128), Vec::W);
}

// A threshold that every score passes (comparisons are "not <=", which NaN always passes).
SPARSE_ATTN_INLINE float open_threshold() {
    return __builtin_nanf("");
}
// One that only NaN passes.
SPARSE_ATTN_INLINE float closed_threshold() {
    return __builtin_inff();
}

// How many of n keys (whole vectors) are at or above the bound.
SPARSE_ATTN_INLINE int32_t count_ge(const int32_t* keys, int32_t n, int32_t bound) {
    int32_t count = 0;
    for (int32_t i = 0; i < n; i += Vec::W) count += __builtin_popcount(keys_ge(keys + i, bound));
    return count;
}

// The largest order key found that at least `keep` of the n keys reach (n >= keep; whole vectors, the tail of
// the last lost), and how many do: at most `most`, unless they tie.
struct Cut {
    int32_t low, at_least;
};
SPARSE_ATTN_INLINE Cut find_cut(const int32_t* keys, int32_t n, int32_t padded, int32_t keep, int32_t most,
                                int32_t known = INT32_MAX) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int32_t i = 0; i < n; ++i) {
        low = minimum(low, keys[i]);
        high = maximum(high, keys[i]);
    }
    if (known != INT32_MAX) low = maximum(low, known);  // one that `keep` keys reach
    // Bisection over the order keys, until few enough are at or above `low` or one value remains.
    int32_t at_least = n;
    while (at_least > most && low != high) {
        uint32_t distance = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
        int32_t middle = static_cast<int32_t>(static_cast<uint32_t>(low) + distance / 2 + (distance & 1));
        int32_t reach = count_ge(keys, padded, middle);
        if (reach >= keep) {
            low = middle;
            at_least = reach;
        } else {
            high = middle - 1;
        }
    }
    return {low, at_least};
}

// Order keys of n values, and of the tail of the last vector keys that lose every comparison. Returns the
// padded length.
SPARSE_ATTN_INLINE int32_t order_all(const float* values, int32_t n, int32_t* keys) {
    const int32_t padded = static_cast<int32_t>(round_up(n, Vec::W));
    for (int32_t i = 0; i < n; i += Vec::W) order_keys(values + i, keys + i);
    for (int32_t i = n; i < padded; ++i) keys[i] = INT32_MIN;
    return padded;
}

// Cuts the buffer to its best `keep` scores (NaN counts as best, ties go to the smaller index), keeping the
// order; with kRough to those and at most a quarter more, in fewer steps. Returns the new threshold. `keys`
// is scratch of the buffer's length.
template <bool kRough>
inline float keep_best(Candidates& c, int32_t* keys) {
    if (c.keep == 0) {
        c.count = 0;
        return closed_threshold();
    }
    if (c.count < c.keep) return open_threshold();
    const int32_t padded = order_all(c.scores, c.count, keys);
    const int32_t most = kRough ? c.keep + c.keep / 4 : c.keep;
    const Cut cut = find_cut(keys, c.count, padded, c.keep, most);
    const int32_t low = cut.low, at_least = cut.at_least;
    // Of those equal to `low`, too many by `excess`: the last ones go.
    const int32_t excess = at_least > most ? at_least - c.keep : 0;
    int32_t equal_left = INT32_MAX;
    if (excess > 0) {
        int32_t equal = 0;
        for (int32_t i = 0; i < padded; i += Vec::W) equal += __builtin_popcount(keys_eq(keys + i, low));
        equal_left = equal - excess;
    }
    int32_t n = 0;
    for (int32_t i = 0; i < c.count; i += Vec::W) {
        uint32_t bits = keys_ge(keys + i, low);
        if (excess > 0) {
            uint32_t equal = keys_eq(keys + i, low);
            while (__builtin_popcount(equal) > equal_left) {
                uint32_t last = 31u - static_cast<uint32_t>(__builtin_clz(equal));
                equal ^= 1u << last;
                bits ^= 1u << last;
            }
            equal_left -= __builtin_popcount(equal);
        }
        n += compress_to(c.scores + n, c.indices + n, bits, c.scores + i, c.indices + i);
    }
    c.count = n;
    int32_t worst = INT32_MAX;
    for (int32_t i = 0; i < n; i += Vec::W) order_keys(c.scores + i, keys + i);
    for (int32_t i = 0; i < n; ++i) worst = minimum(worst, keys[i]);
    return worst == INT32_MAX ? closed_threshold() : float_of_order(worst);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
