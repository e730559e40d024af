// Vec and its operations with AVX2: 8 floats; without a compress instruction.
#pragma once

#include "simd_base.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

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
SPARSE_ATTN_INLINE Vec where_above(Vec s, Vec bound, Vec a) {
    return {_mm256_and_ps(_mm256_cmp_ps(s.v, bound.v, _CMP_NLE_UQ), a.v)};
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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
