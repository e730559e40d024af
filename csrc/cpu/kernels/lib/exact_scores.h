// The scores of a few keys of one query, with the bits that score_tile gives them: the same operations in the
// same order, on W keys that are read as rows and transposed four words at a time.
#pragma once

#include "select_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Four words of each of W rows → out[i]: word i of all rows.
#if defined(__AVX2__)
SPARSE_ATTN_INLINE __m128 four_words(const float* p) {
    return _mm_loadu_ps(p);
}
SPARSE_ATTN_INLINE __m128 four_words(const bfloat16* p) {
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm_castsi128_ps(_mm_slli_epi32(wide, 16));
}
SPARSE_ATTN_INLINE __m128 four_words(const float16* p) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <class Tile, class T>
SPARSE_ATTN_INLINE __m128 words_at(const T* row) {
    if constexpr (Tile::kDepth == 1)
        return four_words(row);
    else
        return _mm_loadu_ps(reinterpret_cast<const float*>(row));
}
#endif

#if defined(__AVX512F__)
template <class Tile, class T>
SPARSE_ATTN_INLINE void transpose_words(const T* const* rows, int64_t d, Vec* out) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_castps128_ps512(words_at<Tile>(rows[i] + d));
        x[i] = _mm512_insertf32x4(x[i], words_at<Tile>(rows[4 + i] + d), 1);
        x[i] = _mm512_insertf32x4(x[i], words_at<Tile>(rows[8 + i] + d), 2);
        x[i] = _mm512_insertf32x4(x[i], words_at<Tile>(rows[12 + i] + d), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), e = _mm512_unpackhi_ps(x[2], x[3]);
    out[0] = {_mm512_shuffle_ps(a, c, 0x44)};
    out[1] = {_mm512_shuffle_ps(a, c, 0xee)};
    out[2] = {_mm512_shuffle_ps(b, e, 0x44)};
    out[3] = {_mm512_shuffle_ps(b, e, 0xee)};
}
#elif defined(__AVX2__)
template <class Tile, class T>
SPARSE_ATTN_INLINE void transpose_words(const T* const* rows, int64_t d, Vec* out) {
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(words_at<Tile>(rows[i] + d)),
                                    words_at<Tile>(rows[4 + i] + d), 1);
    const __m256 a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
    const __m256 c = _mm256_unpacklo_ps(x[2], x[3]), e = _mm256_unpackhi_ps(x[2], x[3]);
    out[0] = {_mm256_shuffle_ps(a, c, 0x44)};
    out[1] = {_mm256_shuffle_ps(a, c, 0xee)};
    out[2] = {_mm256_shuffle_ps(b, e, 0x44)};
    out[3] = {_mm256_shuffle_ps(b, e, 0xee)};
}
#elif defined(SPARSE_ATTN_NEON)
template <class Tile, class T>
SPARSE_ATTN_INLINE void transpose_words(const T* const* rows, int64_t d, Vec* out) {
    Vec words[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        if constexpr (Tile::kDepth == 1)
            words[j] = load(rows[j] + d);
        else
            words[j] = load(reinterpret_cast<const float*>(rows[j] + d));
    }
    transpose(words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) out[i] = words[i];
}
#else
template <class Tile, class T>
SPARSE_ATTN_INLINE void transpose_words(const T* const* rows, int64_t d, Vec* out) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < W; ++j) out[i].v[j] = to_float(rows[j][d + i]);
}
#endif

// scores[i] of the keys indices[i], i < n, with room for whole vectors; `query` are the words of its column
// (Tile::pack_column with width 1), `keys` the head's rows [Tk, D], contiguous in D.
template <class T, class Tile>
inline void exact_scores(const SelectParams& p, const float* query, const T* keys, const int32_t* indices,
                         int64_t n, float* scores) {
    const int64_t word_count = words<Tile>(p), whole = p.head_dim / (4 * Tile::kDepth) * 4;
    constexpr int64_t kTail = 4 * Tile::kDepth;
    for (int64_t i = 0; i < n; i += W) {
        const T* rows[W];
        for (int64_t j = 0; j < W; ++j) rows[j] = keys + indices[minimum(i + j, n - 1)] * p.key_strides.t;
        Vec columns[4];
        typename Tile::Sum sum = Tile::start(nullptr, word_count);
        for (int64_t w = 0; w < whole; w += 4) {
            transpose_words<Tile>(rows, w * Tile::kDepth, columns);
#pragma GCC unroll 4
            for (int64_t c = 0; c < 4; ++c) sum = Tile::multiply_add(query + w + c, columns[c], sum);
        }
        if (whole < word_count) {
            T tails[W][kTail] = {};
            const int64_t first = whole * Tile::kDepth;
            for (int64_t j = 0; j < W; ++j) {
                for (int64_t d = first; d < p.head_dim; ++d) tails[j][d - first] = rows[j][d];
                rows[j] = tails[j];
            }
            transpose_words<Tile>(rows, 0, columns);
            for (int64_t w = whole; w < word_count; ++w)
                sum = Tile::multiply_add(query + w, columns[w - whole], sum);
        }
        store(scores + i, Tile::value(sum));
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
