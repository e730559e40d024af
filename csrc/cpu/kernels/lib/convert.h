// Elements of a tensor as floats and back, one and in rows.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

SPARSE_ATTN_INLINE uint16_t round_to_bfloat16(float x) {
    uint32_t u = bits_of(x);
    if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
SPARSE_ATTN_INLINE void convert(float x, float* to) {
    *to = x;
}
SPARSE_ATTN_INLINE void convert(float x, bfloat16* to) {
    to->bits = round_to_bfloat16(x);
}
SPARSE_ATTN_INLINE void convert(float x, float16* to) {
    to->bits = half_of(x);
}
SPARSE_ATTN_INLINE float to_float(float x) {
    return x;
}
SPARSE_ATTN_INLINE float to_float(bfloat16 x) {
    return float_of(static_cast<uint32_t>(x.bits) << 16);
}
SPARSE_ATTN_INLINE float to_float(float16 x) {
    return float_of_half(x.bits);
}

// The first n < W elements, zeros behind; nothing past them is read.
template <class T>
SPARSE_ATTN_INLINE Vec load_n(const T* p, int64_t n) {
    T padded[Vec::W] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
}

// n floats to n elements of another type, and back.
template <class T>
SPARSE_ATTN_INLINE void store_row(T* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) convert(from[i], to + i);
}
template <class T>
SPARSE_ATTN_INLINE void load_row(float* to, const T* from, int64_t n, int64_t stride = 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i * stride]);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
