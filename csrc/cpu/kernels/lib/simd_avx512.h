// Vec and its operations with AVX-512: 16 floats, masks of their own, compressing stores.
#pragma once

#include "simd_base.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

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
SPARSE_ATTN_INLINE Vec where_above(Vec s, Vec bound, Vec a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s.v, bound.v, _CMP_NLE_UQ), a.v)};
}
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

#if defined(__AVX512BF16__)
#define SPARSE_ATTN_PAIRS
// c + the products of the two bfloat16 of *a with those of each lane of b. Subnormal numbers count as 0.
SPARSE_ATTN_INLINE Vec add_pair_products(const float* a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_set1_ps(*a), (__m512bh)b.v)};
}
#endif

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
