// Rows of scores in whole numbers of 16 bits, and the choice of the best of a row.
//
// A row is read twice: once for the maxima of groups of its keys, whose K-th best is reached by K keys of
// different groups and so never lies above the K-th best of all, and once for what comes near it. With four
// groups a budget's key, some 1.15·K keys pass, in whatever order the good ones come.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Below every score: of keys that do not count.
constexpr int16_t kClosed = -32768;

#if defined(__AVX512F__)
struct Shorts {
    static constexpr int N = 32;
    __m512i v;
};
SPARSE_ATTN_INLINE Shorts load_shorts(const int16_t* p) {
    return {_mm512_loadu_si512(p)};
}
SPARSE_ATTN_INLINE void store(int16_t* p, Shorts a) {
    _mm512_storeu_si512(p, a.v);
}
SPARSE_ATTN_INLINE Shorts all_shorts(int16_t x) {
    return {_mm512_set1_epi16(x)};
}
SPARSE_ATTN_INLINE Shorts max(Shorts a, Shorts b) {
    return {_mm512_max_epi16(a.v, b.v)};
}
// Bit i: a_i is above the bound.
using Marks = uint32_t;
SPARSE_ATTN_INLINE Marks marks_above(Shorts a, Shorts bound) {
    return _mm512_cmpgt_epi16_mask(a.v, bound.v);
}
// How many of x[0, n) are above the bound; n in whole vectors.
SPARSE_ATTN_INLINE int32_t count_above(const int16_t* x, int64_t n, int16_t bound) {
    const __m512i least = _mm512_set1_epi16(bound);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += Shorts::N)
        count += __builtin_popcount(_mm512_cmpgt_epi16_mask(_mm512_loadu_si512(x + i), least));
    return static_cast<int32_t>(count);
}
// Bit i of 64: x[i] is above the bound.
SPARSE_ATTN_INLINE uint64_t bits_above(const int16_t* x, Shorts bound) {
    const uint64_t low = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(x), bound.v);
    const uint64_t high = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(x + 32), bound.v);
    return low | high << 32;
}
#elif defined(__AVX2__)
struct Shorts {
    static constexpr int N = 16;
    __m256i v;
};
SPARSE_ATTN_INLINE Shorts load_shorts(const int16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
SPARSE_ATTN_INLINE void store(int16_t* p, Shorts a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
SPARSE_ATTN_INLINE Shorts all_shorts(int16_t x) {
    return {_mm256_set1_epi16(x)};
}
SPARSE_ATTN_INLINE Shorts max(Shorts a, Shorts b) {
    return {_mm256_max_epi16(a.v, b.v)};
}
using Marks = uint16_t;
SPARSE_ATTN_INLINE Marks marks_above(Shorts a, Shorts bound) {
    const __m256i above = _mm256_cmpgt_epi16(a.v, bound.v);
    return static_cast<Marks>(_mm_movemask_epi8(
        _mm_packs_epi16(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1))));
}
SPARSE_ATTN_INLINE int32_t count_above(const int16_t* x, int64_t n, int16_t bound) {
    const __m256i least = _mm256_set1_epi16(bound);
    __m256i counts = _mm256_setzero_si256();  // a lane overflows only past 2^19 numbers
    for (int64_t i = 0; i < n; i += Shorts::N)
        counts = _mm256_sub_epi16(counts, _mm256_cmpgt_epi16(load_shorts(x + i).v, least));
    const __m256i pairs = _mm256_madd_epi16(counts, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    return _mm_cvtsi128_si32(sum);
}
SPARSE_ATTN_INLINE uint64_t bits_above(const int16_t* x, Shorts bound) {
    uint64_t bits = 0;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m256i a = _mm256_cmpgt_epi16(load_shorts(x + half * 32).v, bound.v);
        const __m256i b = _mm256_cmpgt_epi16(load_shorts(x + half * 32 + 16).v, bound.v);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
        bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << (half * 32);
    }
    return bits;
}
#elif defined(SPARSE_ATTN_NEON)
struct Shorts {
    static constexpr int N = 8;
    int16x8_t v;
};
SPARSE_ATTN_INLINE Shorts load_shorts(const int16_t* p) {
    return {vld1q_s16(p)};
}
SPARSE_ATTN_INLINE void store(int16_t* p, Shorts a) {
    vst1q_s16(p, a.v);
}
SPARSE_ATTN_INLINE Shorts all_shorts(int16_t x) {
    return {vdupq_n_s16(x)};
}
SPARSE_ATTN_INLINE Shorts max(Shorts a, Shorts b) {
    return {vmaxq_s16(a.v, b.v)};
}
using Marks = uint8_t;
SPARSE_ATTN_INLINE Marks marks_above(Shorts a, Shorts bound) {
    const uint16x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return static_cast<Marks>(vaddvq_u16(vandq_u16(vcgtq_s16(a.v, bound.v), bit)));
}
SPARSE_ATTN_INLINE int32_t count_above(const int16_t* x, int64_t n, int16_t bound) {
    const int16x8_t least = vdupq_n_s16(bound);
    int32x4_t counts = vdupq_n_s32(0);
    for (int64_t i = 0; i < n; i += Shorts::N)
        counts = vpadalq_s16(counts, vreinterpretq_s16_u16(vcgtq_s16(vld1q_s16(x + i), least)));
    return -vaddvq_s32(counts);
}
SPARSE_ATTN_INLINE uint64_t bits_above(const int16_t* x, Shorts bound) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t bytes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const uint16x8_t a = vcgtq_s16(vld1q_s16(x + 16 * i), bound.v);
        const uint16x8_t b = vcgtq_s16(vld1q_s16(x + 16 * i + 8), bound.v);
        bytes[i] = vandq_u8(vcombine_u8(vmovn_u16(a), vmovn_u16(b)), bit);
    }
    // Three times the sums of neighbours: a byte for each eight numbers.
    uint8x16_t sums = vpaddq_u8(vpaddq_u8(bytes[0], bytes[1]), vpaddq_u8(bytes[2], bytes[3]));
    sums = vpaddq_u8(sums, sums);
    return vgetq_lane_u64(vreinterpretq_u64_u8(sums), 0);
}
#else
struct Shorts {
    static constexpr int N = 8;
    int16_t v[8];
};
SPARSE_ATTN_INLINE Shorts load_shorts(const int16_t* p) {
    Shorts a;
    memcpy(a.v, p, sizeof a.v);
    return a;
}
SPARSE_ATTN_INLINE void store(int16_t* p, Shorts a) {
    memcpy(p, a.v, sizeof a.v);
}
SPARSE_ATTN_INLINE Shorts all_shorts(int16_t x) {
    Shorts a;
    for (int i = 0; i < 8; ++i) a.v[i] = x;
    return a;
}
SPARSE_ATTN_INLINE Shorts max(Shorts a, Shorts b) {
    for (int i = 0; i < 8; ++i) a.v[i] = maximum(a.v[i], b.v[i]);
    return a;
}
using Marks = uint8_t;
SPARSE_ATTN_INLINE Marks marks_above(Shorts a, Shorts bound) {
    int bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (a.v[i] > bound.v[i]) << i;
    return static_cast<Marks>(bits);
}
SPARSE_ATTN_INLINE int32_t count_above(const int16_t* x, int64_t n, int16_t bound) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += x[i] > bound;
    return count;
}
SPARSE_ATTN_INLINE uint64_t bits_above(const int16_t* x, Shorts bound) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(x[i] > bound.v[0]) << i;
    return bits;
}
#endif

SPARSE_ATTN_INLINE int16_t to_short(int32_t x) {
    return static_cast<int16_t>(clamp<int32_t>(x, kClosed, 32767));
}

// Behind n numbers what loses to all, up to a multiple of 64; returns that.
SPARSE_ATTN_INLINE int64_t close_tail(int16_t* x, int64_t n) {
    const int64_t padded = round_up(n, 64);
    for (int64_t i = n; i < padded; ++i) x[i] = kClosed;
    return padded;
}

SPARSE_ATTN_INLINE int32_t largest_short(const int16_t* x, int64_t n) {
    Shorts most = all_shorts(kClosed);
    for (int64_t i = 0; i < n; i += Shorts::N) most = max(load_shorts(x + i), most);
    int16_t lanes[Shorts::N];
    store(lanes, most);
    int32_t largest = kClosed;
    for (int i = 0; i < Shorts::N; ++i) largest = maximum<int32_t>(largest, lanes[i]);
    return largest;
}

// Where the K-th best of some numbers lies: at least `keep` of them reach `low` (or it is kClosed), and fewer
// than `keep` reach what is above `high`.
struct Reached {
    int32_t low, high;
    int32_t count;  // that reach `low`; INT32_MAX where nobody counted
};

// Narrows it for x[0, n), n in whole vectors, until at most `most` reach `low`, or the two are less than
// `near` apart. `known` is reached by `keep`, or kClosed; the search begins at `guess`.
inline Reached reached_by(const int16_t* x, int64_t n, int32_t keep, int32_t most, int32_t near,
                          int32_t known, int32_t guess) {
    Reached r{known, maximum(known, largest_short(x, n)), INT32_MAX};
    // Steps that double on the way from the guess, then halves.
    int32_t at = guess, step = 64;
    bool below = false, above = false;
    while (r.high - r.low >= near) {
        at = clamp(at, r.low + 1, r.high);
        const int32_t reach = count_above(x, n, static_cast<int16_t>(at - 1));
        if (reach >= keep) {
            r.low = at;
            r.count = reach;
            if (reach <= most) break;
            below = true;
        } else {
            r.high = at - 1;
            above = true;
        }
        at = below && above ? r.low + (r.high - r.low + 1) / 2 : below ? r.low + step : r.high + 1 - step;
        step = minimum(2 * step, 65536);
    }
    return r;
}

// groups[i % G] = max(groups[i % G], x[i]), i < n, in whole vectors; G a multiple of eight vectors.
inline void fold_maxima(int16_t* groups, int64_t group_count, const int16_t* x, int64_t n) {
    constexpr int kTogether = 8;
    constexpr int64_t N = Shorts::N;
    for (int64_t g = 0; g < group_count; g += kTogether * N) {
        Shorts most[kTogether];
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) most[j] = load_shorts(groups + g + j * N);
        int64_t i = g;
        for (; i + kTogether * N <= n; i += group_count)
#pragma GCC unroll 8
            for (int j = 0; j < kTogether; ++j) most[j] = max(load_shorts(x + i + j * N), most[j]);
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) {
            if (i + (j + 1) * N <= n) most[j] = max(load_shorts(x + i + j * N), most[j]);
            store(groups + g + j * N, most[j]);
        }
    }
}

// Writes base + the places of the marked bits, up to 64 numbers too many behind them; returns how many are
// meant.
SPARSE_ATTN_INLINE int32_t append_places(int32_t* to, uint64_t bits, int32_t base) {
    const int32_t count = __builtin_popcountll(bits);
#if defined(__AVX2__)
    if (count <= 6) {
        // Without a branch for each: as many as are usual, whether they are there or not.
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i, bits &= bits - 1) {
            const int32_t place = base + static_cast<int32_t>(_tzcnt_u64(bits));
            // Not a plain store: GCC makes vectors of these first, one by one, which takes longer.
            asm volatile("movl %1, %0" : "=m"(to[i]) : "r"(place));
        }
        return count;
    }
    for (int i = 0; i < 64; i += Vec::W, bits >>= Vec::W)
        to += append_lanes(to, static_cast<uint32_t>(bits) & low_bits(Vec::W), base + i);
#else
    for (int i = 0; bits; ++i, bits &= bits - 1) to[i] = base + __builtin_ctzll(bits);
#endif
    return count;
}

// to[…] = the marked ones of from[0, 64), of which whole vectors up to n are read.
SPARSE_ATTN_INLINE int32_t append_marked(int32_t* to, uint64_t bits, const int32_t* from, int64_t n) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; i += Vec::W, bits >>= Vec::W)
        count += compress_to(to + count, static_cast<uint32_t>(bits) & low_bits(Vec::W), from + i);
    return count;
}

// places[count …] = base + i where x[i] is above the bound, i < n, n a multiple of 64; stops where there are
// more than `full`. Up to 128 numbers are written behind the last. Returns the new count.
inline int32_t places_above(int32_t* places, int32_t count, int32_t full, const int16_t* x, int64_t n,
                            int16_t bound, int32_t base) {
    const Shorts least = all_shorts(bound);
    for (int64_t i = 0; i < n; i += 64) {
        count += append_places(places + count, bits_above(x + i, least), base + static_cast<int32_t>(i));
        if (count > full) break;
    }
    return count;
}

// The same where bit i of `marks` is set, begin <= i < end.
inline int32_t places_marked(int32_t* places, int32_t count, int32_t full, const Marks* marks, int64_t begin,
                             int64_t end, int32_t base) {
    const char* words = reinterpret_cast<const char*>(marks);
    for (int64_t i = begin / 64 * 64; i < end; i += 64) {
        uint64_t bits;
        memcpy(&bits, words + i / 8, 8);
        if (i < begin) bits &= ~uint64_t{0} << (begin - i);
        if (end - i < 64) bits &= ~(~uint64_t{0} << (end - i));
        count += append_places(places + count, bits, base + static_cast<int32_t>(i));
        if (count > full) break;
    }
    return count;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
