// A vector of W floats for the instruction set this file is compiled for, and the few operations the kernels
// need. Everything lives in the namespace of that instruction set, so that no two of them share a symbol.
#pragma once

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__aarch64__) && !defined(SPARSE_ATTN_PLAIN)  // the latter in a test, to compare
#include "simd_neon.h"
#else
#include "simd_generic.h"
#endif

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// ---- the same for every instruction set

// The float whose order key this is (the map is its own inverse on bits); NaN's key gives NaN.
SPARSE_ATTN_INLINE float float_of_order(int32_t key) {
    return float_of(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
