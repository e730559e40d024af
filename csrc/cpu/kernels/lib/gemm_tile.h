// Matrix products of float32 tiles held in registers: kTileRows × kTileCols accumulators, fed by broadcasts
// from A and vector loads from B. Everything a kernel multiplies is first packed: A in groups of kTileRows
// rows, B in panels of kTileCols columns, both padded with zeros, so that no tile has an edge.
//
//   packed A  [M / kTileRows groups][K][kTileRows]
//   packed B  [N / kTileCols panels][K][kTileCols]
//
// What stands there is float32 and K the depth, or (Pairs below) two bfloat16 and K half the depth. With AMX
// a product of pairs is one of its tiles, two by two: rows of A stand one after another there, and K is a
// multiple of 16.
#pragma once

#include "amx.h"
#include "convert.h"
#include "scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVecs = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 of 16
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif
constexpr int kTileCols = kTileVecs * Vec::W;

// Columns of packed B, and of a result that has room for whole tiles.
SPARSE_ATTN_INLINE int64_t padded_cols(int64_t cols) {
    return round_up(cols, kTileCols);
}

// One step of a product: floats …
struct Singles {
    static constexpr int kDepth = 1, kWordStep = 1, kRows = kTileRows;
    // Element k, k + 1, … of a column, of which `left` are there, as one word of a packed operand.
    template <class T>
    static SPARSE_ATTN_INLINE float word(const T* from, int64_t, int64_t /* left */) {
        return to_float(*from);
    }
    static SPARSE_ATTN_INLINE Vec multiply_add(const float* a, const float* b, Vec c) {
        return fma(broadcast(*a), load(b), c);
    }
};
#if defined(SPARSE_ATTN_PAIRS)
// … or pairs of bfloat16: twice the multiply-adds an instruction, summed in float32.
struct Pairs {
    static constexpr int kDepth = 2;
#if defined(SPARSE_ATTN_AMX)
    static constexpr int kWordStep = 16, kRows = 32;
#else
    static constexpr int kWordStep = 1, kRows = kTileRows;
#endif
    template <class T>
    static SPARSE_ATTN_INLINE float word(const T* from, int64_t stride, int64_t left) {
        if (left <= 0) return 0.0f;
        const uint32_t high = left > 1 ? round_to_bfloat16(to_float(from[stride])) : 0u;
        return float_of(high << 16 | round_to_bfloat16(to_float(*from)));
    }
    static SPARSE_ATTN_INLINE Vec multiply_add(const float* a, const float* b, Vec c) {
        return add_pair_products(a, load(b), c);
    }
};
#else
using Pairs = Singles;
#endif
// Whether products are tiles of AMX.
template <class S>
constexpr bool kTiled = S::kWordStep > 1;

// Words of `depth` numbers.
template <class S>
SPARSE_ATTN_INLINE int64_t steps(int64_t depth) {
    return round_up((depth + S::kDepth - 1) / S::kDepth, S::kWordStep);
}

// Elements of packed A and packed B.
SPARSE_ATTN_INLINE int64_t packed_rows_size(int64_t rows, int64_t depth) {
    return round_up(rows, kTileRows) * depth;
}
SPARSE_ATTN_INLINE int64_t packed_cols_size(int64_t depth, int64_t cols) {
    return round_up(cols, kTileCols) * depth;
}

// to[g][k][r] = from(g·width + r, k), element (i, k) of `from` at i·stride + k·depth_stride: panels of
// `width` rows (or columns: the roles are the same), zeros behind the last; k in steps of S.
template <class S = Singles, class T>
inline void pack_panels(float* to, int64_t width, const T* from, int64_t count, int64_t stride, int64_t depth,
                        int64_t depth_stride) {
    const int64_t words = steps<S>(depth), word_stride = S::kDepth * depth_stride;
    for (int64_t first = 0; first < count; first += width, to += width * words) {
        const T* panel = from + first * stride;
        const int64_t n = minimum(width, count - first);
        if (S::kDepth == 1 && stride == 1) {
            for (int64_t k = 0; k < depth; ++k) {
                load_row(to + k * width, panel + k * depth_stride, n);
                for (int64_t j = n; j < width; ++j) to[k * width + j] = 0.0f;
            }
            continue;
        }
        // Blocks of depth, so that the lines written stay in the first-level cache.
        for (int64_t block = 0; block < words; block += 64) {
            const int64_t end = minimum(words, block + 64);
            for (int64_t j = 0; j < n; ++j)
                for (int64_t k = block; k < end; ++k)
                    to[k * width + j] =
                        S::word(panel + j * stride + k * word_stride, depth_stride, depth - k * S::kDepth);
            for (int64_t k = block; k < end; ++k)
                for (int64_t j = n; j < width; ++j) to[k * width + j] = 0.0f;
        }
    }
}
// A: rows × depth, element (i, k) at i·row_stride + k·depth_stride.
template <class S = Singles, class T>
SPARSE_ATTN_INLINE void pack_rows(float* to, const T* from, int64_t rows, int64_t row_stride, int64_t depth,
                                  int64_t depth_stride) {
    if constexpr (kTiled<S>) {
        const int64_t words = steps<S>(depth), padded = round_up(rows, S::kRows);
        for (int64_t i = 0; i < padded; ++i)
            for (int64_t k = 0; k < words; ++k)
                to[i * words + k] = S::word(from + i * row_stride + k * S::kDepth * depth_stride,
                                            depth_stride, i < rows ? depth - k * S::kDepth : 0);
    } else {
        pack_panels<S>(to, kTileRows, from, rows, row_stride, depth, depth_stride);
    }
}
// B: depth × cols, element (k, j) at k·depth_stride + j·col_stride.
template <class S = Singles, class T>
SPARSE_ATTN_INLINE void pack_cols(float* to, const T* from, int64_t depth, int64_t depth_stride, int64_t cols,
                                  int64_t col_stride) {
    pack_panels<S>(to, kTileCols, from, cols, col_stride, depth, depth_stride);
}

// C[r][j] (+)= Σ_k A(r, k) · B(k, j) for one tile: A(r, k) at a[r·a_row + k·a_depth] (packed A: 1 and
// kTileRows), B(k, j) at b[k·ldb + j], C(r, j) at c[r·ldc + j]; k counts words. To be inlined into a function
// that is not: the accumulators need all registers.
template <bool kAdd, class S = Singles>
SPARSE_ATTN_INLINE void multiply_tile(float* c, int64_t ldc, const float* a, int64_t a_row, int64_t a_depth,
                                      const float* b, int64_t ldb, int64_t depth) {
    constexpr int W = Vec::W;
    Vec acc[kTileRows][kTileVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) acc[r][v] = zero();
    for (int64_t k = 0; k < depth; ++k, a += a_depth, b += ldb) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kTileVecs; ++v)
                acc[r][v] = S::multiply_add(a + r * a_row, b + v * W, acc[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) {
            float* to = c + r * ldc + v * W;
            store(to, kAdd ? load(to) + acc[r][v] : acc[r][v]);
        }
}

#if defined(SPARSE_ATTN_AMX)
// The same of 2 × 2 tiles: A(r, k) at a[r·a_row + k]. Somebody holds Tiles(16).
template <bool kAdd>
SPARSE_ATTN_INLINE void multiply_tiles(float* c, int64_t ldc, const float* a, int64_t a_row, const float* b,
                                       int64_t words, int64_t ldb = kTileCols) {
    static_assert(kTileCols == 32);
    const int64_t c_bytes = ldc * 4, a_bytes = a_row * 4, b_bytes = ldb * 4;
    if constexpr (kAdd) {
        tile_load<0>(c, c_bytes);
        tile_load<1>(c + 16, c_bytes);
        tile_load<2>(c + 16 * ldc, c_bytes);
        tile_load<3>(c + 16 * ldc + 16, c_bytes);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t k = 0; k < words; k += 16) {
        tile_load<4>(a + k, a_bytes);
        tile_load<6>(b + k * ldb, b_bytes);
        tile_multiply_add<0, 4, 6>();
        tile_load<7>(b + k * ldb + 16, b_bytes);
        tile_multiply_add<1, 4, 7>();
        tile_load<5>(a + 16 * a_row + k, a_bytes);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
    }
    tile_store<0>(c, c_bytes);
    tile_store<1>(c + 16, c_bytes);
    tile_store<2>(c + 16 * ldc, c_bytes);
    tile_store<3>(c + 16 * ldc + 16, c_bytes);
}
#endif

// What products of pairs need of this thread for as long as it lives.
template <class S>
struct Session {
#if defined(SPARSE_ATTN_AMX)
    Tiles tiles{16};
#endif
};
template <>
struct Session<Singles> {};

// With strides of A that are known at compile time (1 and kTileRows: packed A), and packed B.
template <int kRowStride, int kDepthStride, bool kAdd, class S = Singles>
__attribute__((noinline)) void gemm_tile(float* c, int64_t ldc, const float* a, const float* b,
                                         int64_t depth) {
#if defined(SPARSE_ATTN_AMX)
    if constexpr (kTiled<S>) {
        static_assert(kDepthStride == 1 || kRowStride == 1);
        return multiply_tiles<kAdd>(c, ldc, a, kDepthStride == 1 ? kRowStride : depth, b, depth);
    }
#endif
    multiply_tile<kAdd, S>(c, ldc, a, kRowStride, kDepthStride, b, kTileCols, depth);
}

// C [rows, cols] (+)= A · B from packed operands. C has room for whole tiles: rows and cols rounded up.
template <bool kAdd>
inline void gemm_packed(float* c, int64_t ldc, const float* a, const float* b, int64_t rows, int64_t cols,
                        int64_t depth) {
    for (int64_t j = 0; j < cols; j += kTileCols)
        for (int64_t i = 0; i < rows; i += kTileRows)
            gemm_tile<1, kTileRows, kAdd>(c + i * ldc + j, ldc, a + i * depth, b + j * depth, depth);
}

// ---- a whole product of a block, for sizes where packing is a small part of it

constexpr int64_t kGemmDepth = 256;  // packed at a time

SPARSE_ATTN_INLINE int64_t gemm_scratch_bytes(int64_t rows, int64_t cols, int64_t depth) {
    const int64_t d = minimum(depth, kGemmDepth);
    return 4 * (packed_rows_size(rows, d) + packed_cols_size(d, cols)) + 128;
}

// C [rows, cols] = A [rows, depth] · B [depth, cols] in float32, any strides of A and B (in elements). C has
// room for whole tiles: rows rounded up to kTileRows, ldc >= cols rounded up to kTileCols. The order of the
// sum over `depth` is fixed.
template <class TA, class TB>
inline void gemm(float* c, int64_t ldc, int64_t rows, int64_t cols, int64_t depth, const TA* a, int64_t a_row,
                 int64_t a_depth, const TB* b, int64_t b_depth, int64_t b_col, Scratch scratch) {
    const int64_t most = minimum(depth, kGemmDepth);
    float* packed_a = scratch.take<float>(packed_rows_size(rows, most));
    float* packed_b = scratch.take<float>(packed_cols_size(most, cols));
    if (depth == 0)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] = 0.0f;
    for (int64_t k = 0; k < depth; k += kGemmDepth) {
        const int64_t d = minimum(kGemmDepth, depth - k);
        pack_rows(packed_a, a + k * a_depth, rows, a_row, d, a_depth);
        pack_cols(packed_b, b + k * b_depth, d, b_depth, cols, b_col);
        if (k == 0)
            gemm_packed<false>(c, ldc, packed_a, packed_b, rows, cols, d);
        else
            gemm_packed<true>(c, ldc, packed_a, packed_b, rows, cols, d);
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
