// Vec and its operations with NEON, which every 64-bit ARM has: 4 floats, to the bits of simd_generic.h.
#pragma once

#define SPARSE_ATTN_NEON

#include <arm_neon.h>

#include "simd_base.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

struct Vec {
    static constexpr int W = 4;
    float32x4_t v;
};

// A bit per lane of a mask, and back.
SPARSE_ATTN_INLINE uint32x4_t lane_bits() {
    return uint32x4_t{1, 2, 4, 8};
}
SPARSE_ATTN_INLINE uint32_t movemask(uint32x4_t mask) {
    return vaddvq_u32(vandq_u32(mask, lane_bits()));
}
SPARSE_ATTN_INLINE uint32x4_t mask_of(uint32_t bits) {
    return vtstq_u32(vdupq_n_u32(bits), lane_bits());
}

SPARSE_ATTN_INLINE Vec zero() {
    return {vdupq_n_f32(0.0f)};
}
SPARSE_ATTN_INLINE Vec broadcast(float x) {
    return {vdupq_n_f32(x)};
}
SPARSE_ATTN_INLINE Vec operator+(Vec a, Vec b) {
    return {vaddq_f32(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator-(Vec a, Vec b) {
    return {vsubq_f32(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator*(Vec a, Vec b) {
    return {vmulq_f32(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec operator/(Vec a, Vec b) {
    return {vdivq_f32(a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {vfmaq_f32(c.v, a.v, b.v)};
}
// As AVX's: b where either is NaN (NEON's own maximum is NaN there).
SPARSE_ATTN_INLINE Vec max(Vec a, Vec b) {
    return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec load(const float* p) {
    return {vld1q_f32(p)};
}
SPARSE_ATTN_INLINE Vec load(const bfloat16* p) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
SPARSE_ATTN_INLINE Vec load(const float16* p) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return {vcvt_f32_f16(vreinterpret_f16_u16(bits))};
}
SPARSE_ATTN_INLINE void store(float* p, Vec a) {
    vst1q_f32(p, a.v);
}
SPARSE_ATTN_INLINE Vec load_n(const float* p, int64_t n) {
    float lanes[4] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * 4);
    return {vld1q_f32(lanes)};
}
SPARSE_ATTN_INLINE void store_n(float* p, Vec a, int64_t n) {
    float lanes[4];
    vst1q_f32(lanes, a.v);
    memcpy(p, lanes, static_cast<size_t>(n) * 4);
}
SPARSE_ATTN_INLINE float32x2_t halves_sum(Vec a) {
    return vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
}
SPARSE_ATTN_INLINE float sum(Vec a) {
    return vpadds_f32(halves_sum(a));
}
SPARSE_ATTN_INLINE float max_lane(Vec a) {
    float lanes[4];
    vst1q_f32(lanes, a.v);
    return maximum(maximum(lanes[0], lanes[2]), maximum(lanes[1], lanes[3]));
}
SPARSE_ATTN_INLINE uint32_t not_le(Vec a, Vec b) {
    return movemask(vmvnq_u32(vcleq_f32(a.v, b.v)));
}
SPARSE_ATTN_INLINE uint32_t is_nan(Vec a) {
    return movemask(vmvnq_u32(vceqq_f32(a.v, a.v)));
}
SPARSE_ATTN_INLINE Vec where_above(Vec s, Vec bound, Vec a) {
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v), vcleq_f32(s.v, bound.v)))};
}
SPARSE_ATTN_INLINE Vec where(uint32_t bits, Vec a, Vec b) {
    return {vbslq_f32(mask_of(bits), a.v, b.v)};
}
SPARSE_ATTN_INLINE Vec round_even(Vec a) {
    return {vrndnq_f32(a.v)};
}
SPARSE_ATTN_INLINE Vec scale_by_power(Vec a, Vec n) {
    const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23);
    return {vmulq_f32(a.v, vreinterpretq_f32_s32(e))};
}
SPARSE_ATTN_INLINE Vec transpose_sum(const Vec* v) {
    return {vcombine_f32(vpadd_f32(halves_sum(v[0]), halves_sum(v[1])),
                         vpadd_f32(halves_sum(v[2]), halves_sum(v[3])))};
}
SPARSE_ATTN_INLINE void order_keys(const float* values, int32_t* keys) {
    const float32x4_t x = vaddq_f32(vld1q_f32(values), vdupq_n_f32(0.0f));
    const int32x4_t largest = vdupq_n_s32(0x7fffffff);
    int32x4_t i = vreinterpretq_s32_f32(x);
    i = veorq_s32(i, vandq_s32(vshrq_n_s32(i, 31), largest));
    vst1q_s32(keys, vbslq_s32(vceqq_f32(x, x), i, largest));
}
SPARSE_ATTN_INLINE uint32_t keys_ge(const int32_t* keys, int32_t bound) {
    return movemask(vcgeq_s32(vld1q_s32(keys), vdupq_n_s32(bound)));
}
SPARSE_ATTN_INLINE uint32_t keys_eq(const int32_t* keys, int32_t bound) {
    return movemask(vceqq_s32(vld1q_s32(keys), vdupq_n_s32(bound)));
}
SPARSE_ATTN_INLINE uint32_t nonzero_bytes(const uint8_t* bytes) {
    uint32_t four;
    memcpy(&four, bytes, 4);
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
    return movemask(vtstq_u32(wide, wide));
}
SPARSE_ATTN_INLINE uint32_t in_range(const int32_t* indices, int32_t low, int32_t high) {
    const int32x4_t i = vld1q_s32(indices);
    return movemask(vandq_u32(vcgeq_s32(i, vdupq_n_s32(low)), vcltq_s32(i, vdupq_n_s32(high))));
}

// No compress instruction: a permutation of bytes for each of the 16 sets of lanes, and the marked lanes'
// numbers.
struct LaneTable {
    uint8_t bytes[16][16];
    int32_t lanes[16][4];
};
constexpr LaneTable make_lane_table() {
    LaneTable table{};
    for (int bits = 0; bits < 16; ++bits) {
        int n = 0;
        for (int lane = 0; lane < 4; ++lane)
            if (bits >> lane & 1) {
                for (int b = 0; b < 4; ++b) table.bytes[bits][4 * n + b] = static_cast<uint8_t>(4 * lane + b);
                table.lanes[bits][n++] = lane;
            }
        for (int b = 4 * n; b < 16; ++b) table.bytes[bits][b] = 0xff;  // gives 0
    }
    return table;
}
inline constexpr LaneTable kLanes = make_lane_table();

SPARSE_ATTN_INLINE uint8x16_t compressed(uint8x16_t from, uint32_t bits) {
    return vqtbl1q_u8(from, vld1q_u8(kLanes.bytes[bits]));
}
SPARSE_ATTN_INLINE int append_lanes(int32_t* to, uint32_t bits, int32_t base) {
    vst1q_s32(to, vaddq_s32(vld1q_s32(kLanes.lanes[bits]), vdupq_n_s32(base)));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int compress_to(int32_t* to, uint32_t bits, const int32_t* from) {
    const uint8x16_t packed = compressed(vreinterpretq_u8_s32(vld1q_s32(from)), bits);
    vst1q_s32(to, vreinterpretq_s32_u8(packed));
    return __builtin_popcount(bits);
}
SPARSE_ATTN_INLINE int append(float* values, int32_t* indices, uint32_t bits, Vec a, int32_t base) {
    vst1q_f32(values, vreinterpretq_f32_u8(compressed(vreinterpretq_u8_f32(a.v), bits)));
    return append_lanes(indices, bits, base);
}
SPARSE_ATTN_INLINE int compress_to(float* values, int32_t* indices, uint32_t bits, const float* from_values,
                                   const int32_t* from_indices) {
    const uint8x16_t packed = compressed(vreinterpretq_u8_f32(vld1q_f32(from_values)), bits);
    vst1q_f32(values, vreinterpretq_f32_u8(packed));
    return compress_to(indices, bits, from_indices);
}

// Four rows of four lanes → four columns.
SPARSE_ATTN_INLINE void transpose(Vec (&v)[4]) {
    const float32x4_t a = vzip1q_f32(v[0].v, v[2].v), b = vzip2q_f32(v[0].v, v[2].v);
    const float32x4_t c = vzip1q_f32(v[1].v, v[3].v), d = vzip2q_f32(v[1].v, v[3].v);
    v[0].v = vzip1q_f32(a, c);
    v[1].v = vzip2q_f32(a, c);
    v[2].v = vzip1q_f32(b, d);
    v[3].v = vzip2q_f32(b, d);
}

// ---- products that some of these CPUs have

// Each lane of c + the products of its four bytes of a and of b, none of which is −128.
#if defined(__ARM_FEATURE_DOTPROD)
#define SPARSE_ATTN_NEON_BYTES
SPARSE_ATTN_INLINE int32x4_t add_byte_products(int8x16_t a, int8x16_t b, int32x4_t c) {
    return vdotq_s32(c, a, b);
}
#else
SPARSE_ATTN_INLINE int32x4_t add_byte_products(int8x16_t a, int8x16_t b, int32x4_t c) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(c, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#define SPARSE_ATTN_NEON_BYTE_MATRICES
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SPARSE_ATTN_PAIRS
// c + the products of the two bfloat16 of *a with those of each lane of b. Subnormal numbers count as 0.
SPARSE_ATTN_INLINE Vec add_pair_products(const float* a, Vec b, Vec c) {
    return {vbfdotq_f32(c.v, vreinterpretq_bf16_f32(vld1q_dup_f32(a)), vreinterpretq_bf16_f32(b.v))};
}
// Rounded to even, 4 bfloat16.
SPARSE_ATTN_INLINE uint16x4_t to_bfloat16(Vec a) {
    return vreinterpret_u16_bf16(vcvt_bf16_f32(a.v));
}
#endif

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
