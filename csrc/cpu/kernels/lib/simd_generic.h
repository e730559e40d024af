// Vec and its operations without any: four plain floats, of which the compiler's own vectoriser makes SSE2.
#pragma once

#include "simd_base.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

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
    SPARSE_ATTN_LANES(float_of_half(p[i].bits));
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
SPARSE_ATTN_INLINE Vec where_above(Vec s, Vec bound, Vec a) {
    SPARSE_ATTN_LANES(!(s.v[i] <= bound.v[i]) ? a.v[i] : 0.0f);
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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
