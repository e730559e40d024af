// Register tiles of products of whole numbers of 16 bits: MR queries × NR keys, summed in int32 and compared
// with a whole number per query. All CPUs that have AVX2 multiply two pairs of them where they multiply one
// of float32, and bytes no faster, unless they have VNNI. A panel is
//
//   words  uint32 [ceil(D / 2)][NR]    two components each
//   facts  PanelFacts
#pragma once

#include "rounded_rows.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// One scale for all keys of a panel, and upper bounds over them.
struct PanelFacts {
    float scale, inverse;
    float norm;   // ‖key‖, shifted
    float error;  // ‖key − rounded‖, with the slack
};

SPARSE_ATTN_INLINE int64_t rounded_panel_words(int64_t head_dim) {
    return pair_words(head_dim) * NR + 16;
}
SPARSE_ATTN_INLINE PanelFacts* facts_of(uint32_t* panel, int64_t word_count) {
    return reinterpret_cast<PanelFacts*>(panel + word_count * NR);
}

#if defined(__AVX512F__)
using Sums = __m512i;
SPARSE_ATTN_INLINE Sums no_sums() {
    return _mm512_setzero_si512();
}
SPARSE_ATTN_INLINE Sums load_sums(const uint32_t* p) {
    return _mm512_loadu_si512(p);
}
SPARSE_ATTN_INLINE void store_sums(int32_t* p, Sums a) {
    _mm512_storeu_si512(p, a);
}
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    return _mm512_set1_epi32(static_cast<int>(*p));
}
SPARSE_ATTN_INLINE uint32_t above(Sums a, int32_t bound) {
    return _mm512_cmp_epi32_mask(a, _mm512_set1_epi32(bound), _MM_CMPINT_NLE);
}
SPARSE_ATTN_INLINE Vec floats_of(const int32_t* p) {
    return {_mm512_maskz_cvtepi32_ps(0xffff, _mm512_loadu_si512(p))};
}
SPARSE_ATTN_INLINE void store_whole(int32_t* p, Vec a) {
    _mm512_storeu_si512(p, _mm512_maskz_cvtps_epi32(0xffff, a.v));
}
#if defined(__AVX512VNNI__)
SPARSE_ATTN_INLINE Sums add_products(Sums queries, Sums keys, Sums c) {
    // Not the intrinsic: GCC 12 copies its accumulator around each use, and then runs out of registers.
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(queries), "v"(keys));
    return c;
}
#else
SPARSE_ATTN_INLINE Sums add_products(Sums queries, Sums keys, Sums c) {
    __m512i pairs;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(c), "=&v"(pairs) : "v"(queries), "v"(keys));
    return c;
}
#endif
#elif defined(__AVX2__)
using Sums = __m256i;
SPARSE_ATTN_INLINE Sums no_sums() {
    return _mm256_setzero_si256();
}
SPARSE_ATTN_INLINE Sums load_sums(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SPARSE_ATTN_INLINE void store_sums(int32_t* p, Sums a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    return _mm256_set1_epi32(static_cast<int>(*p));
}
SPARSE_ATTN_INLINE uint32_t above(Sums a, int32_t bound) {
    return movemask(_mm256_cmpgt_epi32(a, _mm256_set1_epi32(bound)));
}
SPARSE_ATTN_INLINE Vec floats_of(const int32_t* p) {
    return {_mm256_cvtepi32_ps(load_int(p))};
}
SPARSE_ATTN_INLINE void store_whole(int32_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(a.v));
}
SPARSE_ATTN_INLINE Sums add_products(Sums queries, Sums keys, Sums c) {
    // Not the intrinsics: GCC 12 multiplies everything first, and then runs out of registers.
    __m256i pairs;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(pairs) : "x"(queries), "x"(keys));
    return c;
}
#else
struct Sums {
    int32_t v[4];
};
SPARSE_ATTN_INLINE Sums no_sums() {
    return {};
}
SPARSE_ATTN_INLINE Sums load_sums(const uint32_t* p) {
    Sums a;
    memcpy(a.v, p, sizeof a.v);
    return a;
}
SPARSE_ATTN_INLINE void store_sums(int32_t* p, Sums a) {
    memcpy(p, a.v, sizeof a.v);
}
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    const int32_t word = static_cast<int32_t>(*p);
    return {{word, word, word, word}};
}
SPARSE_ATTN_INLINE uint32_t above(Sums a, int32_t bound) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a.v[i] > bound) << i;
    return bits;
}
SPARSE_ATTN_INLINE Vec floats_of(const int32_t* p) {
    Vec r;
    for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
}
SPARSE_ATTN_INLINE void store_whole(int32_t* p, Vec a) {
    for (int i = 0; i < 4; ++i) p[i] = static_cast<int32_t>(a.v[i]);
}
SPARSE_ATTN_INLINE Sums add_products(Sums queries, Sums keys, Sums c) {
    for (int i = 0; i < 4; ++i) {
        const auto a = static_cast<uint32_t>(queries.v[i]), b = static_cast<uint32_t>(keys.v[i]);
        c.v[i] += static_cast<int16_t>(a & 0xffff) * static_cast<int16_t>(b & 0xffff) +
                  static_cast<int16_t>(a >> 16) * static_cast<int16_t>(b >> 16);
    }
    return c;
}
#endif

// tile[r][j] = Σ of the products of query r and key j; bit j of beats[r]: it is above bound[r]. Returns the
// rows with any.
__attribute__((noinline)) inline uint32_t rounded_tile(int32_t* tile, const uint32_t* queries,
                                                       const uint32_t* panel, int64_t word_count,
                                                       const int32_t* bound, uint32_t* beats) {
    Sums acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = no_sums();
    for (int64_t w = 0; w < word_count; ++w) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                acc[r][v] = add_products(broadcast_word(queries + w * MR + r),
                                         load_sums(panel + w * NR + v * W), acc[r][v]);
    }
    uint32_t rows = 0;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
        uint32_t bits = 0;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            store_sums(tile + r * NR + v * W, acc[r][v]);
            bits |= above(acc[r][v], bound[r]) << (v * W);
        }
        beats[r] = bits;
        rows |= static_cast<uint32_t>(bits != 0) << r;
    }
    return rows;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
