// Score tiles of a few queries: keys are turned into a panel of columns in registers, W of them at a time, on
// the way from memory; a panel stays in the first-level cache until all queries have seen it. Each score is
// the sum that a tile of packed keys (select_tile.h) makes, term by term in the same order.
#pragma once

#include "select_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

#if !defined(SPARSE_ATTN_NEON)  // which has it
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
        const __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88),
                     high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
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
#endif

// W words of a key from word w on; the second: the first n of them, and zeros, where the key has no more.
template <class Tile, class T>
SPARSE_ATTN_INLINE Vec load_words(const T* key, int64_t w) {
    if constexpr (Tile::kDepth == 1) {
        return load(key + w);
    } else {
        Vec words;
        memcpy(&words, key + w * Tile::kDepth, sizeof words);
        return words;
    }
}
template <class Tile, class T>
SPARSE_ATTN_INLINE Vec load_words_n(const T* key, int64_t w, int64_t n, int64_t head_dim) {
    if (n == W && (w + W) * Tile::kDepth <= head_dim) return load_words<Tile>(key, w);
    if constexpr (Tile::kDepth == 1) {
        return load_n(key + w, n);
    } else {
        T padded[W * Tile::kDepth] = {};
        for (int64_t i = w * Tile::kDepth; i < head_dim; ++i) padded[i - w * Tile::kDepth] = key[i];
        return load_words<Tile>(padded, 0);
    }
}

// Asks for the lines of the NR rows of a panel to come: rows are too short, or too far apart, for the machine
// to foresee them well. They go to the second-level cache: rows a power of two apart would push each other,
// and the panel at hand, out of the first.
template <class T>
struct Ahead {
    // Where rows are long they come in parts side by side: what the machine foresees by itself begins anew in
    // each page of memory, and where one part waits for that the others go on.
    static constexpr int64_t kParts = 4, kLeast = 4096;

    const T* const* row;
    const T* const* end;
    int64_t row_bytes, at = 0;
    bool in_parts;

    static SPARSE_ATTN_INLINE bool in_parts_of(int64_t bytes_of_row) {
        return NR / kParts * bytes_of_row >= kLeast;
    }
    SPARSE_ATTN_INLINE Ahead(const T* const* rows, bool any, int64_t bytes_of_row)
        : row(rows), end(rows), row_bytes(bytes_of_row), in_parts(in_parts_of(bytes_of_row)) {
        if (any) end += in_parts ? NR / kParts : NR;
    }
    SPARSE_ATTN_INLINE void ask(int64_t bytes) {
        if (in_parts)
            ask_in<kParts>(bytes);
        else
            ask_in<1>(bytes);
    }
    template <int Parts>
    SPARSE_ATTN_INLINE void ask_in(int64_t bytes) {
        for (int64_t i = 0; i < bytes && row != end; i += 64 * Parts) {
#pragma GCC unroll 4
            for (int part = 0; part < Parts; ++part)
                __builtin_prefetch(reinterpret_cast<const char*>(row[part * (NR / Parts)]) + at, 0, 2);
            at += 64;
            if (at < row_bytes) continue;
            at = 0;
            ++row;
        }
    }
};

// NR keys of a head, as columns of words.
template <class T, class Tile>
struct KeyPanel {
    static_assert(NV == 2);
    const T* const* rows;  // [NR]
    int64_t offset;        // of the head in a row
    int64_t head_dim;
    Ahead<T>& ahead;

    SPARSE_ATTN_INLINE int64_t words() const { return (head_dim + Tile::kDepth - 1) / Tile::kDepth; }

    // Calls use(w, n, v, columns) for each block of W keys (vector v of the panel) and n <= W words from w
    // on; each key's words come in ascending order.
    template <class F>
    SPARSE_ATTN_INLINE void each_block(const F& use) const {
        const int64_t full = head_dim / (W * Tile::kDepth);
        for (int64_t b = 0; b < full; ++b)
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                ahead.ask(W * W * Tile::kDepth * static_cast<int64_t>(sizeof(T)));
                Vec block[W];
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) block[j] = load_words<Tile>(rows[v * W + j] + offset, b * W);
                transpose(block);
                use(b * W, W, v, block);
            }
        for (int64_t w = full * W; w < words(); w += W)
            for (int v = 0; v < NV; ++v) {
                const int64_t n = minimum<int64_t>(W, words() - w);
                Vec block[W];
                for (int64_t j = 0; j < W; ++j)
                    block[j] = load_words_n<Tile>(rows[v * W + j] + offset, w, n, head_dim);
                transpose(block);
                use(w, n, v, block);
            }
    }
};

// The panel as score_tile takes it, [words][NR].
template <class T, class Tile>
__attribute__((noinline)) void store_panel(const KeyPanel<T, Tile>& keys, float* panel) {
    keys.each_block([&](int64_t w, int64_t n, int v, const Vec(&block)[W]) __attribute__((always_inline)) {
        float* to = panel + w * NR + v * W;
        if (n == W) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(to + i * NR, block[i]);
        } else {
            for (int64_t i = 0; i < n; ++i) store(to + i * NR, block[i]);
        }
    });
}

// Compares R rows of scores with their thresholds, as score_tile does, and stores them where one is better.
template <int R, bool kCompare>
SPARSE_ATTN_INLINE uint32_t finish_tile(const Vec (&scores)[R][NV], float* tile, const float* threshold,
                                        uint32_t* beats) {
    uint32_t rows = kCompare ? 0u : ~0u;
    if constexpr (kCompare) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec bound = broadcast(threshold[r]);
            uint32_t bits = 0;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) bits |= not_le(scores[r][v], bound) << (v * W);
            beats[r] = bits;
            rows |= static_cast<uint32_t>(bits != 0) << r;
        }
    }
    if (rows) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) store(tile + r * NR + v * W, scores[r][v]);
    }
    return rows;
}

// The scores of R queries [words][R] with the panel that stands in memory.
template <class Tile, int R, bool kCompare>
__attribute__((noinline)) uint32_t stored_tile(float* tile, const float* queries, const float* panel,
                                               int64_t word_count, const float* threshold, uint32_t* beats) {
    Vec sums[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] = zero();
    for (int64_t w = 0; w < word_count; ++w) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                sums[r][v] =
                    Tile::multiply_add(queries + w * R + r, load(panel + w * NR + v * W), sums[r][v]);
    }
    return finish_tile<R, kCompare>(sums, tile, threshold, beats);
}

// The same with keys that go from memory through registers: for so few queries that this is all they are
// needed for.
template <class T, class Tile, int R, bool kCompare>
__attribute__((noinline)) uint32_t streamed_tile(const KeyPanel<T, Tile>& keys, float* tile,
                                                 const float* queries, const float* threshold,
                                                 uint32_t* beats) {
    Vec sums[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] = zero();
    keys.each_block([&](int64_t w, int64_t n, int v, const Vec(&block)[W]) __attribute__((always_inline)) {
        const float* query = queries + w * R;
        if (n == W) {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    sums[r][v] = Tile::multiply_add(query + i * R + r, block[i], sums[r][v]);
        } else {
            for (int64_t i = 0; i < n; ++i)
                for (int r = 0; r < R; ++r)
                    sums[r][v] = Tile::multiply_add(query + i * R + r, block[i], sums[r][v]);
        }
    });
    return finish_tile<R, kCompare>(sums, tile, threshold, beats);
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
// So few rows that keys are not stored as a panel.
constexpr int kStreamedRows = 4;

SPARSE_ATTN_INLINE int64_t tile_rows(int64_t rows) {
    return with_rows(rows, []<int R>() -> int64_t { return R; });
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
