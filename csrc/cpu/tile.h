// One register tile of a matrix product, for kernels that multiply packed blocks in float32.
#pragma once

#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // with 2 vectors a row: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 of 16
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * Vec::W;

namespace {

// c[r][j] (+)= Σ_k a[k][r] · b[k][j]: a [depth, kTileRows] packed, b [depth, kTileColumns] with rows
// b_stride apart, c [kTileRows, kTileColumns] with rows c_stride apart. Not inlined: the accumulators need
// all registers.
template <bool kAccumulate>
__attribute__((noinline)) void multiply_tile(float* c, int64_t c_stride, const float* a, const float* b,
                                             int64_t b_stride, int64_t depth) {
    Vec acc[kTileRows][kTileVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v)
            acc[r][v] = kAccumulate ? load(c + r * c_stride + v * Vec::W) : zero();
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVectors; ++v)
                acc[r][v] =
                    fma(broadcast(a[k * kTileRows + r]), load(b + k * b_stride + v * Vec::W), acc[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) store(c + r * c_stride + v * Vec::W, acc[r][v]);
}

}  // namespace

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
