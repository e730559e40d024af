// A vector of W floats for the instruction set this file is compiled for, and the few operations the kernels
// need. Everything lives in the namespace of that instruction set, so that no two of them share a symbol.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers read "uninitialised" registers on purpose and warn about it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#ifndef SPARSE_ATTN_ISA
#define SPARSE_ATTN_ISA generic
#endif

#define SPARSE_ATTN_INLINE inline __attribute__((always_inline))

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T>
SPARSE_ATTN_INLINE T minimum(T a, T b) {
    return a < b ? a : b;
}
template <class T>
SPARSE_ATTN_INLINE T maximum(T a, T b) {
    return a > b ? a : b;
}
template <class T>
SPARSE_ATTN_INLINE T clamp(T x, T low, T high) {
    return minimum(maximum(x, low), high);
}
SPARSE_ATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

SPARSE_ATTN_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
SPARSE_ATTN_INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// The low n bits, 0 <= n <= 32.
SPARSE_ATTN_INLINE uint32_t low_bits(int64_t n) {
    return n >= 32 ? ~0u : (1u << n) - 1u;
}

// Order-preserving integer of a float: −0 equals +0, NaN is largest.
SPARSE_ATTN_INLINE int32_t order_of(float x) {
    if (x != x) return 0x7fffffff;
    const int32_t i = static_cast<int32_t>(bits_of(x + 0.0f));
    return i ^ ((i >> 31) & 0x7fffffff);
}

// ---- one instruction set: Vec, lanes(), loads and stores, comparisons, compression

#if defined(__AVX512F__)

struct Vec {
    static constexpr int W = 16;
    __m512 v;
};

SPARSE_ATTN_INLINE Vec zero() {
    return {_mm512_setzero_ps()};
}
SPARSE_ATTN_INLINE Vec broadcast(float x) {
    return {_mm512_set1_ps(x)};
}
SPARSE_ATTN_INLINE Vec operator+(Vec a, Vec b) {
    return {_mm512_add_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator-(Vec a, Vec b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator*(Vec a, Vec b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator/(Vec a, Vec b) {
    return {_mm512_div_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// The larger; b where either is NaN.
SPARSE_ATTN_INLINE Vec max(Vec a, Vec b) {
    return {_mm512_max_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
SPARSE_ATTN_INLINE Vec load(const bfloat16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SPARSE_ATTN_INLINE Vec load(const float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
SPARSE_ATTN_INLINE void store(float* p, Vec a) {
    _mm512_storeu_ps(p, a.v);
}
SPARSE_ATTN_INLINE Vec load_n(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(low_bits(n)), p)};
}
SPARSE_ATTN_INLINE void store_n(float* p, Vec a, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(low_bits(n)), a.v);
}
SPARSE_ATTN_INLINE float sum(Vec a) {
    return _mm512_reduce_add_ps(a.v);
}
SPARSE_ATTN_INLINE float max_lane(Vec a) {
    return _mm512_reduce_max_ps(a.v);
}
// Bit i: not (a_i <= b_i); NaN on either side sets it.
SPARSE_ATTN_INLINE uint32_t not_le(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
}
SPARSE_ATTN_INLINE uint32_t is_nan(Vec a) {
    return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
}
// a where the bit is set, else b.
SPARSE_ATTN_INLINE Vec where(uint32_t bits, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
SPARSE_ATTN_INLINE Vec round_even(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a · 2^n for whole n.
SPARSE_ATTN_INLINE Vec scale_by_power(Vec a, Vec n) {
    return {_mm512_scalef_ps(a.v, n.v)};
}

// Lane i of the result is the sum over the lanes of v[i].
SPARSE_ATTN_INLINE Vec transpose_sum(const Vec* v) {
    __m512 pair[8], quad[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v),
                                _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88),
                               _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88),
                                _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

// Appends the marked lanes of `a` and their indices (base + lane); writes up to W elements past either
// cursor.
SPARSE_ATTN_INLINE int append(float* values, int32_t* indices, uint32_t bits, Vec a, int32_t base) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 m = static_cast<__mmask16>(bits);
    // Compress to a register, then store whole: compressing straight to memory is microcoded on some
    // machines.
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, a.v));
    _mm512_storeu_si512(indices,
                        _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lane, _mm512_set1_epi32(base))));
    return __builtin_popcount(bits);
}

// The marked ones of base + lane, and of W numbers; written as append() does.
SPARSE_ATTN_INLINE int append_lanes(int32_t* to, uint32_t bits, int32_t base) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits),
                                                        _mm512_add_epi32(lane, _mm512_set1_epi32(base))));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int compress_to(int32_t* to, uint32_t bits, const int32_t* from) {
    _mm512_storeu_si512(to,
                        _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(from)));
    return __builtin_popcount(bits);
}

// Keys that order floats as integers (see order_of), counted, compared and compressed.
SPARSE_ATTN_INLINE void order_keys(const float* values, int32_t* keys) {
    __m512 x = _mm512_add_ps(_mm512_loadu_ps(values), _mm512_setzero_ps());
    __m512i i = _mm512_castps_si512(x);
    i = _mm512_xor_si512(i, _mm512_and_si512(_mm512_srai_epi32(i, 31), _mm512_set1_epi32(0x7fffffff)));
    i = _mm512_mask_mov_epi32(i, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fffffff));
    _mm512_storeu_si512(keys, i);
}
SPARSE_ATTN_INLINE uint32_t keys_ge(const int32_t* keys, int32_t bound) {
    return _mm512_cmp_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(bound), _MM_CMPINT_NLT);
}
SPARSE_ATTN_INLINE uint32_t keys_eq(const int32_t* keys, int32_t bound) {
    return _mm512_cmp_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(bound), _MM_CMPINT_EQ);
}
SPARSE_ATTN_INLINE int compress_to(float* values, int32_t* indices, uint32_t bits, const float* from_values,
                                   const int32_t* from_indices) {
    __mmask16 m = static_cast<__mmask16>(bits);
    __m512 x = _mm512_loadu_ps(from_values);
    __m512i i = _mm512_loadu_si512(from_indices);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, x));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(m, i));
    return __builtin_popcount(bits);
}
// Bit i: bytes[i] != 0.
SPARSE_ATTN_INLINE uint32_t nonzero_bytes(const uint8_t* bytes) {
    __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return 0xffffu & ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(b, _mm_setzero_si128())));
}
// Bit i: low <= indices[i] < high.
SPARSE_ATTN_INLINE uint32_t in_range(const int32_t* indices, int32_t low, int32_t high) {
    __m512i i = _mm512_loadu_si512(indices);
    return _mm512_mask_cmp_epi32_mask(_mm512_cmp_epi32_mask(i, _mm512_set1_epi32(low), _MM_CMPINT_NLT), i,
                                      _mm512_set1_epi32(high), _MM_CMPINT_LT);
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int W = 8;
    __m256 v;
};

SPARSE_ATTN_INLINE __m256i lane_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SPARSE_ATTN_INLINE Vec zero() {
    return {_mm256_setzero_ps()};
}
SPARSE_ATTN_INLINE Vec broadcast(float x) {
    return {_mm256_set1_ps(x)};
}
SPARSE_ATTN_INLINE Vec operator+(Vec a, Vec b) {
    return {_mm256_add_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator-(Vec a, Vec b) {
    return {_mm256_sub_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator*(Vec a, Vec b) {
    return {_mm256_mul_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator/(Vec a, Vec b) {
    return {_mm256_div_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
SPARSE_ATTN_INLINE Vec max(Vec a, Vec b) {
    return {_mm256_max_ps(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec load(const float* p) {
    return {_mm256_loadu_ps(p)};
}
SPARSE_ATTN_INLINE Vec load(const bfloat16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
SPARSE_ATTN_INLINE Vec load(const float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
SPARSE_ATTN_INLINE void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.v);
}
SPARSE_ATTN_INLINE Vec load_n(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, lane_mask(n))};
}
SPARSE_ATTN_INLINE void store_n(float* p, Vec a, int64_t n) {
    _mm256_maskstore_ps(p, lane_mask(n), a.v);
}
SPARSE_ATTN_INLINE float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
SPARSE_ATTN_INLINE float max_lane(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
SPARSE_ATTN_INLINE uint32_t not_le(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
SPARSE_ATTN_INLINE uint32_t is_nan(Vec a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
}
SPARSE_ATTN_INLINE Vec where(uint32_t bits, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i m = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m))};
}
SPARSE_ATTN_INLINE Vec round_even(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SPARSE_ATTN_INLINE Vec scale_by_power(Vec a, Vec n) {
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
SPARSE_ATTN_INLINE Vec transpose_sum(const Vec* v) {
    __m256 pair[4], quad[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v),
                                _mm256_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return {_mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                          _mm256_permute2f128_ps(quad[0], quad[1], 0x31))};
}
SPARSE_ATTN_INLINE void order_keys(const float* values, int32_t* keys) {
    __m256 x = _mm256_add_ps(_mm256_loadu_ps(values), _mm256_setzero_ps());
    __m256i i = _mm256_castps_si256(x);
    i = _mm256_xor_si256(i, _mm256_and_si256(_mm256_srai_epi32(i, 31), _mm256_set1_epi32(0x7fffffff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    i = _mm256_blendv_epi8(i, _mm256_set1_epi32(0x7fffffff), nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(keys), i);
}
SPARSE_ATTN_INLINE uint32_t movemask(__m256i m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
}
SPARSE_ATTN_INLINE __m256i load_int(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SPARSE_ATTN_INLINE uint32_t keys_ge(const int32_t* keys, int32_t bound) {
    return 0xffu & ~movemask(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), load_int(keys)));
}
SPARSE_ATTN_INLINE uint32_t keys_eq(const int32_t* keys, int32_t bound) {
    return movemask(_mm256_cmpeq_epi32(load_int(keys), _mm256_set1_epi32(bound)));
}
SPARSE_ATTN_INLINE uint32_t nonzero_bytes(const uint8_t* bytes) {
    __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return 0xffu & ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(b, _mm_setzero_si128())));
}
SPARSE_ATTN_INLINE uint32_t in_range(const int32_t* indices, int32_t low, int32_t high) {
    __m256i i = load_int(indices);
    return movemask(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), i),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32(high), i)));
}

#else  // Four plain floats: the compiler's own vectoriser makes SSE2 or NEON of the loops.

struct Vec {
    static constexpr int W = 4;
    float v[4];
};

#define SPARSE_ATTN_LANES(expression)                \
    Vec r;                                           \
    for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

SPARSE_ATTN_INLINE Vec zero() {
    return {{0, 0, 0, 0}};
}
SPARSE_ATTN_INLINE Vec broadcast(float x) {
    return {{x, x, x, x}};
}
SPARSE_ATTN_INLINE Vec operator+(Vec a, Vec b) {
    SPARSE_ATTN_LANES(a.v[i] + b.v[i]);
}
SPARSE_ATTN_INLINE Vec operator-(Vec a, Vec b) {
    SPARSE_ATTN_LANES(a.v[i] - b.v[i]);
}
SPARSE_ATTN_INLINE Vec operator*(Vec a, Vec b) {
    SPARSE_ATTN_LANES(a.v[i] * b.v[i]);
}
SPARSE_ATTN_INLINE Vec operator/(Vec a, Vec b) {
    SPARSE_ATTN_LANES(a.v[i] / b.v[i]);
}
SPARSE_ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) {
    SPARSE_ATTN_LANES(a.v[i] * b.v[i] + c.v[i]);
}
SPARSE_ATTN_INLINE Vec max(Vec a, Vec b) {
    SPARSE_ATTN_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
SPARSE_ATTN_INLINE Vec load(const float* p) {
    SPARSE_ATTN_LANES(p[i]);
}
SPARSE_ATTN_INLINE Vec load(const bfloat16* p) {
    SPARSE_ATTN_LANES(float_of(static_cast<uint32_t>(p[i].bits) << 16));
}
SPARSE_ATTN_INLINE Vec load(const float16* p) {
    Vec r;
    for (int i = 0; i < 4; ++i) {
        _Float16 half;
        memcpy(&half, &p[i].bits, 2);
        r.v[i] = static_cast<float>(half);
    }
    return r;
}
SPARSE_ATTN_INLINE void store(float* p, Vec a) {
    memcpy(p, a.v, sizeof a.v);
}
SPARSE_ATTN_INLINE Vec load_n(const float* p, int64_t n) {
    SPARSE_ATTN_LANES(i < n ? p[i] : 0.0f);
}
SPARSE_ATTN_INLINE void store_n(float* p, Vec a, int64_t n) {
    memcpy(p, a.v, static_cast<size_t>(n) * 4);
}
SPARSE_ATTN_INLINE float sum(Vec a) {
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}
SPARSE_ATTN_INLINE float max_lane(Vec a) {
    return maximum(maximum(a.v[0], a.v[2]), maximum(a.v[1], a.v[3]));
}
#define SPARSE_ATTN_BITS(condition)                                         \
    uint32_t r = 0;                                                         \
    for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(condition) << i; \
    return r
SPARSE_ATTN_INLINE uint32_t not_le(Vec a, Vec b) {
    SPARSE_ATTN_BITS(!(a.v[i] <= b.v[i]));
}
SPARSE_ATTN_INLINE uint32_t is_nan(Vec a) {
    SPARSE_ATTN_BITS(a.v[i] != a.v[i]);
}
SPARSE_ATTN_INLINE Vec where(uint32_t bits, Vec a, Vec b) {
    SPARSE_ATTN_LANES((bits >> i & 1) ? a.v[i] : b.v[i]);
}
SPARSE_ATTN_INLINE Vec round_even(Vec a) {
    SPARSE_ATTN_LANES(__builtin_rintf(a.v[i]));
}
SPARSE_ATTN_INLINE Vec scale_by_power(Vec a, Vec n) {
    SPARSE_ATTN_LANES(
        a.v[i] *
        float_of(static_cast<uint32_t>(static_cast<int>(n.v[i] == n.v[i] ? n.v[i] : 0.0f) + 127) << 23));
}
SPARSE_ATTN_INLINE Vec transpose_sum(const Vec* v) {
    SPARSE_ATTN_LANES(sum(v[i]));
}
SPARSE_ATTN_INLINE void order_keys(const float* values, int32_t* keys) {
    for (int i = 0; i < 4; ++i) keys[i] = order_of(values[i]);
}
SPARSE_ATTN_INLINE uint32_t keys_ge(const int32_t* keys, int32_t bound) {
    SPARSE_ATTN_BITS(keys[i] >= bound);
}
SPARSE_ATTN_INLINE uint32_t keys_eq(const int32_t* keys, int32_t bound) {
    SPARSE_ATTN_BITS(keys[i] == bound);
}
SPARSE_ATTN_INLINE uint32_t nonzero_bytes(const uint8_t* bytes) {
    SPARSE_ATTN_BITS(bytes[i] != 0);
}
SPARSE_ATTN_INLINE uint32_t in_range(const int32_t* indices, int32_t low, int32_t high) {
    SPARSE_ATTN_BITS(indices[i] >= low && indices[i] < high);
}
#undef SPARSE_ATTN_LANES
#undef SPARSE_ATTN_BITS
SPARSE_ATTN_INLINE int append_lanes(int32_t* to, uint32_t bits, int32_t base) {
    int count = 0;
    for (; bits; bits &= bits - 1) to[count++] = base + __builtin_ctz(bits);
    return count;
}

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// No compress instruction: a permutation for each of the 256 sets of lanes.
struct LaneTable {
    uint64_t bytes[256];  // byte n: the n-th marked lane
};
constexpr LaneTable make_lane_table() {
    LaneTable table{};
    for (int bits = 0; bits < 256; ++bits) {
        int n = 0;
        for (int lane = 0; lane < 8; ++lane)
            if (bits >> lane & 1) table.bytes[bits] |= static_cast<uint64_t>(lane) << (8 * n++);
    }
    return table;
}
inline constexpr LaneTable kLanes = make_lane_table();

SPARSE_ATTN_INLINE __m256i marked_lanes(uint32_t bits) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanes.bytes + bits)));
}
SPARSE_ATTN_INLINE int append(float* values, int32_t* indices, uint32_t bits, Vec a, int32_t base) {
    const __m256i lanes = marked_lanes(bits);
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(a.v, lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(base)));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int compress_to(float* values, int32_t* indices, uint32_t bits, const float* from_values,
                                   const int32_t* from_indices) {
    const __m256i lanes = marked_lanes(bits), from = load_int(from_indices);
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from_values), lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices), _mm256_permutevar8x32_epi32(from, lanes));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int append_lanes(int32_t* to, uint32_t bits, int32_t base) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_add_epi32(marked_lanes(bits), _mm256_set1_epi32(base)));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int compress_to(int32_t* to, uint32_t bits, const int32_t* from) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permutevar8x32_epi32(load_int(from), marked_lanes(bits)));
    return __builtin_popcount(bits);
}
#elif !defined(__AVX512F__)
SPARSE_ATTN_INLINE int compress_to(int32_t* to, uint32_t bits, const int32_t* from) {
    int n = 0;
    for (; bits; bits &= bits - 1) to[n++] = from[__builtin_ctz(bits)];
    return n;
}
// Survivors are few, so a loop over the set bits will do.
SPARSE_ATTN_INLINE int append(float* values, int32_t* indices, uint32_t bits, Vec a, int32_t base) {
    float lanes[Vec::W];
    store(lanes, a);
    int n = 0;
    for (; bits; bits &= bits - 1, ++n) {
        int lane = __builtin_ctz(bits);
        values[n] = lanes[lane];
        indices[n] = base + lane;
    }
    return n;
}
SPARSE_ATTN_INLINE int compress_to(float* values, int32_t* indices, uint32_t bits, const float* from_values,
                                   const int32_t* from_indices) {
    int n = 0;
    for (; bits; bits &= bits - 1, ++n) {
        int lane = __builtin_ctz(bits);
        values[n] = from_values[lane];
        indices[n] = from_indices[lane];
    }
    return n;
}
#endif

// ---- the same for every instruction set

// The float whose order key this is (the map is its own inverse on bits); NaN's key gives NaN.
SPARSE_ATTN_INLINE float float_of_order(int32_t key) {
    return float_of(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
