// Register tiles of scores: MR queries × NR keys of dot products, accumulated over D from keys packed in
// panels of NR columns. A packed column (a key, or a query) is `words` of 4 bytes that hold one component or
// a few, and behind them what its kind of tile needs to finish a score:
//
//   panel    [words + kExtra][NR]        query tile    [words + kExtra][MR]
#pragma once

#include "convert.h"
#include "cpu/kernels/topk_select.h"
#include "scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int W = Vec::W;
#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 of 16
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int NR = NV * W;

// One component per word.
struct FloatTile {
    static constexpr int kDepth = 1, kExtra = 0;
    template <bool kQuery, class T>
    static SPARSE_ATTN_INLINE void pack_column(float* to, int64_t width, const T* from, int64_t stride,
                                               int64_t n, int64_t words, float sign) {
        for (int64_t w = 0; w < words; ++w) to[w * width] = to_float(from[w * stride]) * sign;
        (void)n;
    }
    using Sum = Vec;
    static SPARSE_ATTN_INLINE Sum start(const float*, int64_t) { return zero(); }
    static SPARSE_ATTN_INLINE Sum multiply_add(const float* a, Vec b, Sum c) {
        return fma(broadcast(*a), b, c);
    }
    static SPARSE_ATTN_INLINE Vec value(Sum sum) { return sum; }
};

#if defined(SPARSE_ATTN_PAIRS)
// Pairs of bfloat16 multiplied and added to float32 in one instruction.
struct BFloat16Tile {
    static constexpr int kDepth = 2, kExtra = 0;
    static SPARSE_ATTN_INLINE uint32_t half(bfloat16 x, float sign) {
        if (sign == 1.0f) return x.bits;
        return round_to_bfloat16(to_float(x) * sign);
    }
    template <bool kQuery>
    static SPARSE_ATTN_INLINE void pack_column(float* to, int64_t width, const bfloat16* from, int64_t stride,
                                               int64_t n, int64_t words, float sign) {
        for (int64_t w = 0; w < words; ++w) {
            uint32_t low = half(from[2 * w * stride], sign);
            uint32_t high = 2 * w + 1 < n ? half(from[(2 * w + 1) * stride], sign) : 0u;
            to[w * width] = float_of(low | high << 16);
        }
    }
    using Sum = Vec;
    static SPARSE_ATTN_INLINE Sum start(const float*, int64_t) { return zero(); }
    static SPARSE_ATTN_INLINE Sum multiply_add(const float* a, Vec b, Sum c) {
        return add_pair_products(a, b, c);
    }
    static SPARSE_ATTN_INLINE Vec value(Sum sum) { return sum; }
};
#else
using BFloat16Tile = FloatTile;
#endif

// Columns rounded to whole numbers of [−127, 127] times the column's scale, its largest magnitude / 127. Sums
// of products of such numbers are exact, so every instruction set scores alike. A column that holds no finite
// scale (NaN, infinity) has only NaN scores.
struct Rounded {
    float scale;
    template <class T>
    SPARSE_ATTN_INLINE void fit(const T* from, int64_t stride, int64_t n) {
        float largest = 0.0f, nan = 0.0f;
        for (int64_t d = 0; d < n; ++d) {
            const float x = __builtin_fabsf(to_float(from[d * stride]));
            largest = maximum(largest, x);
            nan += x - x;  // NaN from an infinity or a NaN, else 0
        }
        scale = largest / 127.0f + nan;
    }
    SPARSE_ATTN_INLINE float operator()(float x) const {
        // A scale below the normal range is too coarse to keep all quotients within 127 by itself.
        return scale > 0.0f ? clamp(__builtin_rintf(x / scale), -127.0f, 127.0f) : 0.0f;
    }
};

#if defined(__AVX512VNNI__) || defined(SPARSE_ATTN_NEON_BYTES)
// Four components per word. AVX-512's instruction multiplies unsigned by signed bytes: queries are stored
// + 128, and the sums start at −128 · Σ key. Behind the words: the scale, then that start.
struct Int8Tile {
#if defined(__AVX512VNNI__)
    static constexpr int kDepth = 4, kExtra = 2, kMore = 128;
#else
    static constexpr int kDepth = 4, kExtra = 1, kMore = 0;
#endif
    template <bool kQuery, class T>
    static SPARSE_ATTN_INLINE void pack_column(float* to, int64_t width, const T* from, int64_t stride,
                                               int64_t n, int64_t words, float sign) {
        Rounded rounded;
        rounded.fit(from, stride, n);
        int32_t total = 0;
        for (int64_t w = 0; w < words; ++w) {
            uint32_t word = 0;
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t d = 4 * w + i;
                const int32_t x = d < n ? static_cast<int32_t>(rounded(to_float(from[d * stride]))) : 0;
                total += x;
                word |= static_cast<uint32_t>((x + (kQuery ? kMore : 0)) & 0xff) << (8 * i);
            }
            to[w * width] = float_of(word);
        }
        to[words * width] = rounded.scale * sign;
        if constexpr (kMore != 0) to[(words + 1) * width] = float_of(static_cast<uint32_t>(-kMore * total));
    }
#if defined(__AVX512VNNI__)
    using Sum = __m512i;
    static SPARSE_ATTN_INLINE Sum start(const float* panel, int64_t words) {
        return _mm512_loadu_si512(panel + (words + 1) * NR);
    }
    static SPARSE_ATTN_INLINE Sum multiply_add(const float* a, Vec b, Sum c) {
        int32_t query;
        memcpy(&query, a, 4);
        const __m512i queries = _mm512_set1_epi32(query), keys = _mm512_castps_si512(b.v);
        // Not the intrinsic: GCC 12 copies its accumulator around each use, and then runs out of registers.
        asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(queries), "v"(keys));
        return c;
    }
    static SPARSE_ATTN_INLINE Vec value(Sum sum) { return {_mm512_maskz_cvtepi32_ps(0xffff, sum)}; }
#else
    using Sum = int32x4_t;
    static SPARSE_ATTN_INLINE Sum start(const float*, int64_t) { return vdupq_n_s32(0); }
    static SPARSE_ATTN_INLINE Sum multiply_add(const float* a, Vec b, Sum c) {
        return add_byte_products(vreinterpretq_s8_f32(vld1q_dup_f32(a)), vreinterpretq_s8_f32(b.v), c);
    }
    static SPARSE_ATTN_INLINE Vec value(Sum sum) { return {vcvtq_f32_s32(sum)}; }
#endif
};
#else
// The same numbers as floats, which hold their sums exactly up to D = 1,040.
struct Int8Tile {
    static constexpr int kDepth = 1, kExtra = 1;
    template <bool kQuery, class T>
    static SPARSE_ATTN_INLINE void pack_column(float* to, int64_t width, const T* from, int64_t stride,
                                               int64_t n, int64_t words, float sign) {
        Rounded rounded;
        rounded.fit(from, stride, n);
        for (int64_t w = 0; w < words; ++w) to[w * width] = rounded(to_float(from[w * stride]));
        to[words * width] = rounded.scale * sign;
    }
    using Sum = Vec;
    static SPARSE_ATTN_INLINE Sum start(const float*, int64_t) { return zero(); }
    static SPARSE_ATTN_INLINE Sum multiply_add(const float* a, Vec b, Sum c) {
        return fma(broadcast(*a), b, c);
    }
    static SPARSE_ATTN_INLINE Vec value(Sum sum) { return sum; }
};
#endif

// Calls f.template operator()<T, Tile>() for the dtype and the kind of score.
template <class F>
SPARSE_ATTN_INLINE void with_tile(const SelectParams& p, const F& f) {
    if (p.rounded) {
        if (p.dtype == DType::kFloat32) f.template operator()<float, Int8Tile>();
        if (p.dtype == DType::kBFloat16) f.template operator()<bfloat16, Int8Tile>();
        if (p.dtype == DType::kFloat16) f.template operator()<float16, Int8Tile>();
    } else {
        if (p.dtype == DType::kFloat32) f.template operator()<float, FloatTile>();
        if (p.dtype == DType::kBFloat16) f.template operator()<bfloat16, BFloat16Tile>();
        if (p.dtype == DType::kFloat16) f.template operator()<float16, FloatTile>();
    }
}

template <class Tile>
SPARSE_ATTN_INLINE int64_t words(const SelectParams& p) {
    return (p.head_dim + Tile::kDepth - 1) / Tile::kDepth;
}
// Words of a packed column, and what stands behind them.
template <class Tile>
SPARSE_ATTN_INLINE int64_t column_words(const SelectParams& p) {
    return words<Tile>(p) + Tile::kExtra;
}

// Queries are packed with it, so that the best keys have the largest scores.
SPARSE_ATTN_INLINE float sign_of(float scale) {
    return scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f;
}

// Panels of one key head.
SPARSE_ATTN_INLINE int64_t panel_count(const SelectParams& p) {
    return (p.key_length + NR - 1) / NR;
}

// `rows` rows to columns, padded with zeros to `width`.
template <class Tile, bool kQuery, class T>
SPARSE_ATTN_INLINE void pack(const SelectParams& p, float* to, int64_t width, const T* from, int64_t rows,
                             int64_t row_stride, int64_t stride, float sign) {
    for (int64_t j = 0; j < rows; ++j)
        Tile::template pack_column<kQuery>(to + j, width, from + j * row_stride, stride, p.head_dim,
                                           words<Tile>(p), sign);
    for (int64_t w = 0; w < column_words<Tile>(p); ++w)
        for (int64_t j = rows; j < width; ++j) to[w * width + j] = 0.0f;
}

// acc[r][v]: sums of query r with the keys of vector v, without the scales of rounded columns. To be inlined
// into a function that is not: the accumulators need all registers.
template <class Tile>
SPARSE_ATTN_INLINE void accumulate(Vec (&acc)[MR][NV], const float* queries, const float* panel,
                                   int64_t word_count) {
    typename Tile::Sum sums[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const typename Tile::Sum start = Tile::start(panel + v * W, word_count);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) sums[r][v] = start;
    }
    for (int64_t w = 0; w < word_count; ++w) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                sums[r][v] =
                    Tile::multiply_add(queries + w * MR + r, load(panel + w * NR + v * W), sums[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Tile::value(sums[r][v]);
}

// Bit j of beats[r]: the score of query r and key j is not <= the row's threshold. Returns the rows with any.
SPARSE_ATTN_INLINE uint32_t compare(const Vec (&acc)[MR][NV], const float* threshold, uint32_t* beats) {
    uint32_t rows = 0;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
        const Vec bound = broadcast(threshold[r]);
        uint32_t bits = 0;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) bits |= not_le(acc[r][v], bound) << (v * W);
        beats[r] = bits;
        rows |= static_cast<uint32_t>(bits != 0) << r;
    }
    return rows;
}

// tile[r][j] = score of query r and key j of the panel, compared if wanted.
template <class Tile, bool kCompare>
__attribute__((noinline)) uint32_t score_tile(float* tile, const float* queries, const float* panel,
                                              int64_t word_count, const float* threshold, uint32_t* beats) {
    Vec acc[MR][NV];
    accumulate<Tile>(acc, queries, panel, word_count);
    if constexpr (Tile::kExtra > 0) {
        const float *row_scale = queries + word_count * MR, *key_scale = panel + word_count * NR;
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                acc[r][v] = acc[r][v] * load(key_scale + v * W) * broadcast(row_scale[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(tile + r * NR + v * W, acc[r][v]);
    if constexpr (kCompare) return compare(acc, threshold, beats);
    return 0;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
