// What the instruction sets share: the namespace, half types, small arithmetic.
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

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
