// Tiles of products of rounded numbers: MR queries × NR keys, summed in int32 or float32, of which 16 bits
// are kept.
//
// By pairs of 16 bits: all CPUs that have AVX2 multiply two pairs of them where they multiply one of float32.
// By bytes: with VNNI twice as many again; elsewhere no faster than by pairs. By tiles of bfloat16: with AMX,
// 16 times as many as of float32. 64-bit ARM gains by bytes alone: four times as many with the dot product,
// eight times as matrices. A panel is
//
//   words    uint32 [ceil(D / 2), of tiles a multiple of 16, or ceil(D / 4), even for matrices][NR]
//   bytes    int32 [NR], −128 · Σ of the key's numbers, and int16 [NR], its scale as a part of the panel's,
//   in 2⁻¹⁵ facts    PanelFacts
#pragma once

#include "rounded_rows.h"
#include "score_rows.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// One scale for all keys of a panel, 2^exponent, and upper bounds over them.
struct PanelFacts {
    int32_t exponent;
    float norm;        // ‖key‖, shifted
    float error;       // ‖key − rounded‖, with the slack
    float plain_norm;  // ‖key‖ as it is
};

template <class Kind>
constexpr int64_t kPanelExtra = Kind::kBits == kByteBits ? NR + NR / 2 : 0;

template <class Kind>
SPARSE_ATTN_INLINE int64_t rounded_panel_words(int64_t head_dim) {
    return rounded_words<Kind>(head_dim) * NR + kPanelExtra<Kind> + 16;
}
template <class Kind>
SPARSE_ATTN_INLINE PanelFacts* facts_of(uint32_t* panel, int64_t word_count) {
    return reinterpret_cast<PanelFacts*>(panel + word_count * NR + kPanelExtra<Kind>);
}

// How far sums are shifted down at the panels' largest scale, so that what is left fits 16 bits.
template <class Kind>
SPARSE_ATTN_INLINE int32_t least_shift(int64_t head_dim) {
    if (kFloats<Kind>) return 0;
    if (Kind::kBits == kPairBits) return 15;
    int32_t shift = 0;
    while (head_dim * 127 * 127 >> shift > 32766) ++shift;
    return shift;
}

#if defined(__AVX512F__)
using Sums = __m512i;
// Both in 16 bits, the nearest that these can say.
SPARSE_ATTN_INLINE Shorts as_shorts(Sums a, Sums b) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return {_mm512_maskz_permutexvar_epi64(0xff, order, _mm512_packs_epi32(a, b))};
}
SPARSE_ATTN_INLINE Sums no_sums() {
    return _mm512_setzero_si512();
}
SPARSE_ATTN_INLINE Sums load_sums(const uint32_t* p) {
    return _mm512_loadu_si512(p);
}
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    return _mm512_set1_epi32(static_cast<int>(*p));
}
SPARSE_ATTN_INLINE Shorts upper_halves(Sums a, Sums b, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    return as_shorts(_mm512_maskz_sra_epi32(0xffff, a, count), _mm512_maskz_sra_epi32(0xffff, b, count));
}
#if defined(__AVX512VNNI__)
#define SPARSE_ATTN_BYTE_TILES
SPARSE_ATTN_INLINE Sums add_byte_products(Sums queries, Sums keys, Sums c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(queries), "v"(keys));
    return c;
}
// The same times factors in 2⁻¹⁵, rounded.
SPARSE_ATTN_INLINE Shorts scaled(Shorts a, Shorts factors) {
    return {_mm512_mulhrs_epi16(a.v, factors.v)};
}
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
SPARSE_ATTN_INLINE Shorts upper_halves(Sums a, Sums b, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    const __m256i pairs = _mm256_packs_epi32(_mm256_sra_epi32(a, count), _mm256_sra_epi32(b, count));
    return {_mm256_permute4x64_epi64(pairs, 0xd8)};
}
SPARSE_ATTN_INLINE void add_products(const uint32_t* query, Sums a, Sums b, Sums& to_a, Sums& to_b) {
    // Not the intrinsics: GCC 12 multiplies everything first, and then runs out of registers. Additions take
    // turns with products on the same ports, and leave more of them to products when two go together.
    __m256i pairs, word;
    asm("vpbroadcastd %6, %3\n\tvpmaddwd %4, %3, %2\n\tvpmaddwd %5, %3, %3\n\t"
        "vpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
        : "+x"(to_a), "+x"(to_b), "=&x"(pairs), "=&x"(word)
        : "x"(a), "x"(b), "m"(*query));
}
#elif defined(SPARSE_ATTN_NEON)
using Sums = int32x4_t;
SPARSE_ATTN_INLINE Sums no_sums() {
    return vdupq_n_s32(0);
}
SPARSE_ATTN_INLINE Sums load_sums(const uint32_t* p) {
    return vreinterpretq_s32_u32(vld1q_u32(p));
}
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    return vreinterpretq_s32_u32(vld1q_dup_u32(p));
}
SPARSE_ATTN_INLINE Shorts upper_halves(Sums a, Sums b, int shift) {
    const int32x4_t down = vdupq_n_s32(-shift);
    return {vcombine_s16(vqmovn_s32(vshlq_s32(a, down)), vqmovn_s32(vshlq_s32(b, down)))};
}
SPARSE_ATTN_INLINE Shorts scaled(Shorts a, Shorts factors) {
    return {vqrdmulhq_s16(a.v, factors.v)};
}
SPARSE_ATTN_INLINE Sums add_products(Sums queries, Sums keys, Sums c) {
    const int16x8_t a = vreinterpretq_s16_s32(queries), b = vreinterpretq_s16_s32(keys);
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return vaddq_s32(c, vpaddq_s32(low, high));
}

// acc[r][v]: sums of the products of bytes, with their signs on either side.
#define SPARSE_ATTN_BYTE_TILES
#if defined(SPARSE_ATTN_NEON_BYTE_MATRICES)
// Two queries times two keys an instruction, eight bytes of each (pair_words).
SPARSE_ATTN_INLINE void multiply_bytes(Sums (&acc)[MR][NV], const uint32_t* queries, const uint32_t* panel,
                                       int64_t word_count) {
    static_assert(MR == 4 && W == 4 && NV == 2);
    Sums squares[2][4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) squares[i][j] = no_sums();
    for (int64_t w = 0; w < word_count; w += 2, queries += 2 * MR, panel += 2 * NR) {
        int8x16_t keys[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) keys[j] = vreinterpretq_s8_s32(load_sums(panel + j % 2 * NR + j / 2 * W));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const int8x16_t rows = vreinterpretq_s8_s32(load_sums(queries + i * MR));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) squares[i][j] = vmmlaq_s32(squares[i][j], rows, keys[j]);
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            const Sums a = squares[i][2 * v], b = squares[i][2 * v + 1];
            acc[2 * i][v] = vcombine_s32(vget_low_s32(a), vget_low_s32(b));
            acc[2 * i + 1][v] = vcombine_s32(vget_high_s32(a), vget_high_s32(b));
        }
}
#else
SPARSE_ATTN_INLINE void multiply_bytes(Sums (&acc)[MR][NV], const uint32_t* queries, const uint32_t* panel,
                                       int64_t word_count) {
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[r][v] = no_sums();
    for (int64_t w = 0; w < word_count; ++w) {
        int8x16_t keys[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) keys[v] = vreinterpretq_s8_s32(load_sums(panel + w * NR + v * W));
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) {
            const int8x16_t query = vreinterpretq_s8_s32(broadcast_word(queries + w * MR + r));
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) acc[r][v] = add_byte_products(query, keys[v], acc[r][v]);
        }
    }
}
#endif
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
SPARSE_ATTN_INLINE Sums broadcast_word(const uint32_t* p) {
    const int32_t word = static_cast<int32_t>(*p);
    return {{word, word, word, word}};
}
SPARSE_ATTN_INLINE Shorts upper_halves(Sums a, Sums b, int shift) {
    Shorts s;
    for (int i = 0; i < 4; ++i) {
        s.v[i] = static_cast<int16_t>(a.v[i] >> shift);
        s.v[4 + i] = static_cast<int16_t>(b.v[i] >> shift);
    }
    return s;
}
#define SPARSE_ATTN_BYTE_TILES
SPARSE_ATTN_INLINE Sums add_byte_products(Sums queries, Sums keys, Sums c) {
    for (int i = 0; i < 4; ++i)
        for (int bit = 0; bit < 32; bit += 8)
            c.v[i] += static_cast<int32_t>(static_cast<uint8_t>(static_cast<uint32_t>(queries.v[i]) >> bit)) *
                      static_cast<int8_t>(static_cast<uint32_t>(keys.v[i]) >> bit);
    return c;
}
SPARSE_ATTN_INLINE Shorts scaled(Shorts a, Shorts factors) {
    for (int i = 0; i < NR; ++i) a.v[i] = static_cast<int16_t>((a.v[i] * factors.v[i] + 0x4000) >> 15);
    return a;
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

#if defined(__AVX512F__) || !defined(__AVX2__)
SPARSE_ATTN_INLINE void add_products(const uint32_t* query, Sums a, Sums b, Sums& to_a, Sums& to_b) {
    const Sums word = broadcast_word(query);
    to_a = add_products(word, a, to_a);
    to_b = add_products(word, b, to_b);
}
#endif

// Where the scores of row groups go: those of a row side by side, a mark a panel, and a bound for each row,
// NR times.
struct GroupScores {
    int16_t* scores;
    int64_t stride;
    const int16_t* bounds;
    Marks* marks;
    int64_t mark_stride;

    SPARSE_ATTN_INLINE GroupScores group(int64_t g) const {
        return {scores + g * MR * stride, stride, bounds + g * MR * NR, marks + g * MR * mark_stride,
                mark_stride};
    }
    SPARSE_ATTN_INLINE GroupScores panel(int64_t n) const {
        return {scores + n * NR, stride, bounds, marks + n, mark_stride};
    }
};

// to[r · stride + j] = Σ of the products of query r and key j, over 2^shift, rounded down; by bytes times the
// key's scale, rounded. Bit j of marks[r · mark_stride]: it is above the row's bound, all of whose numbers
// are alike.
template <class Kind>
__attribute__((noinline)) inline void rounded_tile(int16_t* to, int64_t stride, const uint32_t* queries,
                                                   const uint32_t* panel, int64_t word_count, int shift,
                                                   const int16_t* bounds, Marks* marks, int64_t mark_stride) {
    static_assert(NV == 2 && NR == Shorts::N);
    Sums acc[MR][NV];
    if constexpr (Kind::kBits != kByteBits) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = no_sums();
        for (int64_t w = 0; w < word_count; ++w) {
            const Sums a = load_sums(panel + w * NR), b = load_sums(panel + w * NR + W);
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r) add_products(queries + w * MR + r, a, b, acc[r][0], acc[r][1]);
        }
    } else {
#if defined(SPARSE_ATTN_NEON)
        multiply_bytes(acc, queries, panel, word_count);
#elif defined(SPARSE_ATTN_BYTE_TILES)
        const uint32_t* starts = panel + word_count * NR;
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = load_sums(starts + v * W);
        for (int64_t w = 0; w < word_count; ++w) {
            const Sums a = load_sums(panel + w * NR), b = load_sums(panel + w * NR + W);
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r) {
                const Sums query = broadcast_word(queries + w * MR + r);
                acc[r][0] = add_byte_products(query, a, acc[r][0]);
                acc[r][1] = add_byte_products(query, b, acc[r][1]);
            }
        }
#endif
    }
    [[maybe_unused]] const int16_t* factors = reinterpret_cast<const int16_t*>(panel + word_count * NR + NR);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
        Shorts score = upper_halves(acc[r][0], acc[r][1], shift);
#if defined(SPARSE_ATTN_BYTE_TILES)
        if constexpr (Kind::kBits == kByteBits) score = scaled(score, load_shorts(factors));
#endif
        store(to + r * stride, score);
        marks[r * mark_stride] = marks_above(score, load_shorts(bounds + r * NR));
    }
}

#if defined(SPARSE_ATTN_AMX)
// Sums of a row group, rows of words, with the keys of a panel, which tiles 2 · kSet and 2 · kSet + 1 hold
// until they are stored.
struct TileSums {
    alignas(64) float at[MR * NR];

    template <int kSet>
    static SPARSE_ATTN_INLINE void multiply(const uint32_t* queries, const uint32_t* panel,
                                            int64_t word_count) {
        static_assert(NV == 2 && W == 16);
        tile_zero<2 * kSet>();
        tile_zero<2 * kSet + 1>();
        for (int64_t w = 0; w < word_count; w += 16) {
            tile_load<4 + kSet>(queries + w, word_count * 4);
            tile_load<6>(panel + w * NR, NR * 4);
            tile_multiply_add<2 * kSet, 4 + kSet, 6>();
            tile_load<7>(panel + w * NR + W, NR * 4);
            tile_multiply_add<2 * kSet + 1, 4 + kSet, 7>();
        }
    }
    template <int kSet>
    SPARSE_ATTN_INLINE void store() {
        tile_store<2 * kSet>(at, NR * 4);
        tile_store<2 * kSet + 1>(at + W, NR * 4);
    }
    // To scores of 16 bits: a unit is 1.
    SPARSE_ATTN_INLINE void finish(const GroupScores& to) const {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const float* sum = at + r * NR;
            const Shorts score = as_shorts(_mm512_maskz_cvtps_epi32(0xffff, load(sum).v),
                                           _mm512_maskz_cvtps_epi32(0xffff, load(sum + W).v));
            cpu::SPARSE_ATTN_ISA::store(to.scores + r * to.stride, score);
            to.marks[r * to.mark_stride] = marks_above(score, load_shorts(to.bounds + r * NR));
        }
    }
};

// The same by tiles of bfloat16: a panel is multiplied with each row group while it is in the first-level
// cache. While one half of the tiles is multiplied, the other is stored, and what was stored before is
// finished.
__attribute__((noinline)) inline void score_by_tiles(GroupScores to, const uint32_t* queries, int groups,
                                                     const uint32_t* panels, Range some, int64_t word_count,
                                                     int64_t panel_words) {
    const Tiles tiles(MR);
    TileSums sums[2];
    GroupScores places[2];
    int64_t begun = 0;  // products
    const auto step = [&]<int kSet>(const uint32_t* rows, const uint32_t* panel, const GroupScores& place)
                          __attribute__((always_inline)) {
                              if (panel) TileSums::multiply<kSet>(rows, panel, word_count);
                              if (begun > 1) sums[kSet].finish(places[kSet]);
                              if (begun > 0) sums[1 - kSet].template store<1 - kSet>();
                              places[kSet] = place;
                              ++begun;
                          };
    const auto next = [&](const uint32_t* rows, const uint32_t* panel, const GroupScores& place)
                          __attribute__((always_inline)) {
                              if (begun & 1)
                                  step.template operator()<1>(rows, panel, place);
                              else
                                  step.template operator()<0>(rows, panel, place);
                          };
    for (int64_t n = some.begin; n < some.end; ++n)
        for (int g = 0; g < groups; ++g)
            next(queries + g * word_count * MR, panels + n * panel_words, to.group(g).panel(n - some.begin));
    // What is under way.
    if (begun == 0) return;
    next(nullptr, nullptr, {});
    sums[begun & 1].finish(places[begun & 1]);
}
#endif

// The tiles of some of the panels and of row groups side by side; `most` is the shift of a panel of exponent
// 0.
template <class Kind>
inline void score_panels(GroupScores to, const uint32_t* queries, int groups, uint32_t* panels, Range some,
                         int64_t head_dim, int32_t most) {
    const int64_t word_count = rounded_words<Kind>(head_dim), size = rounded_panel_words<Kind>(head_dim);
#if defined(SPARSE_ATTN_AMX)
    if constexpr (kFloats<Kind>) return score_by_tiles(to, queries, groups, panels, some, word_count, size);
#endif
    for (int g = 0; g < groups; ++g)
        for (int64_t n = some.begin; n < some.end; ++n) {
            uint32_t* panel = panels + n * size;
            const int shift = minimum(31, most - facts_of<Kind>(panel, word_count)->exponent);
            const GroupScores at = to.group(g).panel(n - some.begin);
            rounded_tile<Kind>(at.scores, at.stride, queries + g * word_count * MR, panel, word_count, shift,
                               at.bounds, at.marks, at.mark_stride);
        }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
