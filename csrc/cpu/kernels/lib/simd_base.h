// What the instruction sets share: the namespace, half types, small arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
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

// A half number's bits as a float and back, rounded to even. Compilers' own _Float16 is not in C++ before gcc
// 12 and clang 15, on ARM not before gcc 13, and calls functions that old systems do not have.
#if defined(__F16C__)
SPARSE_ATTN_INLINE float float_of_half(uint16_t half) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}
SPARSE_ATTN_INLINE uint16_t half_of(float x) {
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
#elif defined(__aarch64__) && !defined(SPARSE_ATTN_PLAIN)
SPARSE_ATTN_INLINE float float_of_half(uint16_t half) {
    __fp16 number;
    memcpy(&number, &half, 2);
    return static_cast<float>(number);
}
SPARSE_ATTN_INLINE uint16_t half_of(float x) {
    const __fp16 number = static_cast<__fp16>(x);
    uint16_t half;
    memcpy(&half, &number, 2);
    return half;
}
#else
SPARSE_ATTN_INLINE float float_of_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, digits = half & 0x3ffu;
    if (exponent == 0) return float_of(bits_of(static_cast<float>(digits) * 0x1p-24f) | sign);
    if (exponent == 31) return float_of(sign | 0x7f800000u | digits << 13 | (digits ? 0x400000u : 0));
    return float_of(sign | (exponent + 112) << 23 | digits << 13);
}
SPARSE_ATTN_INLINE uint16_t half_of(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
    uint32_t size = bits_of(x) & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (size >> 13 & 0x3ffu));
    if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65,536 on
    if (size >= 0x38800000u) {  // from 2^-14 on; what is rounded up past 65,504 becomes infinite by the carry
        size += 0xfffu + (size >> 13 & 1);
        return static_cast<uint16_t>(sign | (size - 0x38000000u) >> 13);
    }
    if (size <= 0x33000000u) return static_cast<uint16_t>(sign);  // up to 2^-25, half of the smallest
    const uint32_t digits = (size & 0x7fffffu) | 0x800000u, shift = 126 - (size >> 23);
    const uint32_t rest = digits & ((1u << shift) - 1), middle = 1u << (shift - 1);
    uint32_t half = digits >> shift;
    half += rest > middle || (rest == middle && (half & 1));
    return static_cast<uint16_t>(sign | half);
}
#endif

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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
