// Score tiles of a few queries: keys are turned into a panel of columns in registers, W of them at a time, on the
// way from memory; a panel stays in the first-level cache until all queries have seen it. Each score is the sum that
// a tile of packed keys (select_tile.h) makes, term by term in the same order.
#pragma once

#include "select_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// W rows of W lanes → W columns.
SPARSE_ATTN_INLINE void transpose(Vec (&v)[W]) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + 2 + j]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    }
    // b[4 i + j] has in its four parts the components j, 4 + j, 8 + j, 12 + j of rows 4 i … 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
        const __m512 low2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88),
                     high2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
        v[j].v = _mm512_shuffle_f32x4(low, low2, 0x88);
        v[4 + j].v = _mm512_shuffle_f32x4(high, high2, 0x88);
        v[8 + j].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
        v[12 + j].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
#elif defined(__AVX2__)
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        v[j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
        v[4 + j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
    }
#else
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            const float x = v[i].v[j];
            v[i].v[j] = v[j].v[i];
            v[j].v[i] = x;
        }
#endif
}

// W words of a key from word w on; the first n of them, and zeros, where the key has no more.
template <class Tile, class T>
SPARSE_ATTN_INLINE Vec key_words(const T* key, int64_t w, int64_t n, int64_t head_dim) {
    if constexpr (Tile::kDepth == 1) {
        return n == W ? load(key + w) : load_n(key + w, n);
    } else {
        const int64_t left = head_dim - w * Tile::kDepth;
        if (left < W * Tile::kDepth) {
            T padded[W * Tile::kDepth] = {};
            for (int64_t i = 0; i < left; ++i) padded[i] = key[w * Tile::kDepth + i];
            Vec words;
            memcpy(&words, padded, sizeof words);
            return words;
        }
        Vec words;
        memcpy(&words, key + w * Tile::kDepth, sizeof words);
        return words;
    }
}

// The panel of keys [first, first + NR); none past `end`, whose columns repeat the last key.
template <class T, class Tile>
__attribute__((noinline)) void gather_panel(const SelectParams& p, float* panel, const T* keys, int64_t first,
                                            int64_t end) {
    const int64_t word_count = words<Tile>(p), stride = p.key_strides.t;
    const bool whole = first + NR <= end;
    for (int64_t v = 0; v < NR; v += W) {
        const T* row = keys + (first + v) * stride;
        for (int64_t w = 0; w < word_count; w += W) {
            const int64_t n = minimum<int64_t>(W, word_count - w);
            Vec block[W];
            if (whole && (w + W) * Tile::kDepth <= p.head_dim) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) block[j] = key_words<Tile>(row + j * stride, w, W, (w + W) * Tile::kDepth);
            } else {
                for (int64_t j = 0; j < W; ++j)
                    block[j] = key_words<Tile>(keys + minimum(first + v + j, end - 1) * stride, w, n, p.head_dim);
            }
            transpose(block);
            float* to = panel + w * NR + v;
            if (n == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) store(to + i * NR, block[i]);
            } else {
                for (int64_t i = 0; i < n; ++i) store(to + i * NR, block[i]);
            }
        }
    }
}

// score_tile for R queries [words][R]; the tile is stored where a score beats its row's threshold, or always.
template <class Tile, int R, bool kCompare>
__attribute__((noinline)) uint32_t decode_tile(float* tile, const float* queries, const float* panel,
                                               int64_t word_count, const float* threshold, uint32_t* beats) {
    typename Tile::Sum sums[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] = Tile::start(panel, word_count);
    for (int64_t w = 0; w < word_count; ++w) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                sums[r][v] = Tile::multiply_add(queries + w * R + r, panel + w * NR + v * W, sums[r][v]);
    }
    uint32_t rows = kCompare ? 0u : ~0u;
    if constexpr (kCompare) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec bound = broadcast(threshold[r]);
            uint32_t bits = 0;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) bits |= not_le(Tile::value(sums[r][v]), bound) << (v * W);
            beats[r] = bits;
            rows |= static_cast<uint32_t>(bits != 0) << r;
        }
    }
    if (rows) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) store(tile + r * NR + v * W, Tile::value(sums[r][v]));
    }
    return rows;
}

// Calls f.template operator()<T, Tile>() with the tile of unrounded scores.
template <class F>
SPARSE_ATTN_INLINE void with_exact_tile(DType dtype, const F& f) {
    if (dtype == DType::kFloat32) f.template operator()<float, FloatTile>();
    if (dtype == DType::kBFloat16) f.template operator()<bfloat16, BFloat16Tile>();
    if (dtype == DType::kFloat16) f.template operator()<float16, FloatTile>();
}

// Calls f.template operator()<R>() for the smallest tile that holds `rows` queries.
template <class F>
SPARSE_ATTN_INLINE auto with_rows(int64_t rows, const F& f) {
    if (rows == 1) return f.template operator()<1>();
    if (rows == 2) return f.template operator()<2>();
    if (rows == 3) return f.template operator()<3>();
    if constexpr (MR > 4) {
        if (rows == 4) return f.template operator()<4>();
        if constexpr (MR > 6) {
            if (rows <= 6) return f.template operator()<6>();
            if (rows <= 8) return f.template operator()<8>();
        }
    }
    return f.template operator()<MR>();
}
SPARSE_ATTN_INLINE int64_t tile_rows(int64_t rows) {
    return with_rows(rows, []<int R>() -> int64_t { return R; });
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
