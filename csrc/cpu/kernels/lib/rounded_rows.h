// Rows rounded to whole numbers of 16 or of 8 bits, or to bfloat16, for the bounds of bounds.h: W rows at a
// time, component by component (x[d][W]), so that every step is a vector of rows.
//
// A row is rotated before it is rounded: an orthogonal rotation of queries and keys alike changes no product
// and spreads what stands in a few components over all of them, where it costs fewer bits.
#pragma once

#include "amx.h"
#include "exact_scores.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kWidest = 256;  // D

// Norms between these leave no product of two rows that overflows, or loses more to underflow than the
// bound's slack.
constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p60f;
// Norms are float32 sums themselves: a factor that makes them upper bounds.
constexpr float kNormSlack = 1.0001f;

// Of ‖q‖·‖k‖: what the float32 sum of the exact score may be off by (at most two roundings a step, 2D ·
// 2⁻²⁴), and the rotation, the scores and the thresholds made of rounded rows (a few roundings each).
SPARSE_ATTN_INLINE float slack_of(int64_t head_dim) {
    return static_cast<float>(head_dim + 64) * 0x1p-23f;
}

// Norms of rows rounded to 16 bits: with half a step more in each of D components, the products of two rows
// stay below 2^30, in part and in whole.
constexpr float kWholeNorm = 32700.0f;

// What a row is rounded to: two numbers a word, or four.
struct ByPairs {
    static constexpr int kNumbers = 2, kBits = kPairBits, kWordStep = 1;
    static constexpr float kMost = 32767.0f;
};
struct ByBytes {
#if defined(SPARSE_ATTN_NEON_BYTE_MATRICES)
    static constexpr int kWordStep = 2;  // as pair_words has them
#else
    static constexpr int kWordStep = 1;
#endif
    static constexpr int kNumbers = 4, kBits = kByteBits;
    static constexpr float kMost = 127.0f;
};
// bfloat16, multiplied in tiles of 16 words: no scale of its own, and no rotation, which would gain nothing.
struct ByTiles {
    static constexpr int kNumbers = 2, kBits = kTileBits, kWordStep = 16;
    static constexpr float kMost = 32000.0f;  // of a score in units
};
// What bytes of queries are changed by: x86 multiplies numbers without a sign by such with one.
#if defined(SPARSE_ATTN_NEON)
constexpr uint32_t kQueryFlip = 0;
#else
constexpr uint32_t kQueryFlip = 0x80808080u;  // 128 more
#endif
template <class Kind>
constexpr bool kFloats = Kind::kBits == kTileBits;

template <class Kind>
SPARSE_ATTN_INLINE int64_t rounded_words(int64_t head_dim) {
    return round_up((head_dim + Kind::kNumbers - 1) / Kind::kNumbers, Kind::kWordStep);
}

SPARSE_ATTN_INLINE float power_of_two(int32_t exponent) {
    return float_of(static_cast<uint32_t>(exponent + 127) << 23);
}
SPARSE_ATTN_INLINE Vec root(Vec a) {
    float lanes[W];
    store(lanes, a);
    for (int j = 0; j < W; ++j) lanes[j] = __builtin_sqrtf(lanes[j]);
    return load(lanes);
}

// x[d][j] = (row j)[d] − shift[d], zeros for rows from n on; returns the norms of the rows as they come.
template <class T>
inline Vec load_columns(float* x, const T* from, int64_t n, int64_t row_stride, int64_t stride,
                        int64_t head_dim, float sign, const float* shift) {
    int64_t done = 0;
    if (stride == 1 && n > 0) {
        const T* rows[W];
        for (int64_t j = 0; j < W; ++j) rows[j] = from + minimum(j, n - 1) * row_stride;
        for (; done + 4 <= head_dim; done += 4) {
            Vec columns[4];
            transpose_words<FloatTile>(rows, done, columns);
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) store(x + (done + c) * W, columns[c] * broadcast(sign));
        }
    }
    for (int64_t j = 0; j < n; ++j)
        for (int64_t d = done; d < head_dim; ++d)
            x[d * W + j] = to_float(from[j * row_stride + d * stride]) * sign;
    const uint32_t there = low_bits(n);
    Vec squares = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        const Vec a = where(there, load(x + d * W), zero());
        squares = fma(a, a, squares);
        store(x + d * W, shift ? where(there, a - broadcast(shift[d]), zero()) : a);
    }
    return root(squares) * broadcast(kNormSlack);
}

// Orthonormal Hadamard transforms of the components, in blocks of powers of two.
inline void rotate(float* x, int64_t head_dim) {
    for (int64_t begin = 0, size; begin < head_dim; begin += size) {
        for (size = 1; begin + 2 * size <= head_dim;) size *= 2;
        float* block = x + begin * W;
        for (int64_t half = 1; half < size; half *= 2)
            for (int64_t i = 0; i < size; i += 2 * half)
                for (int64_t j = i; j < i + half; ++j) {
                    const Vec a = load(block + j * W), b = load(block + (j + half) * W);
                    store(block + j * W, a + b);
                    store(block + (j + half) * W, a - b);
                }
        const Vec unit = broadcast(1.0f / __builtin_sqrtf(static_cast<float>(size)));
        for (int64_t j = 0; j < size; ++j) store(block + j * W, load(block + j * W) * unit);
    }
}

SPARSE_ATTN_INLINE Vec norms_of(const float* x, int64_t head_dim) {
    Vec squares = zero();
    for (int64_t d = 0; d < head_dim; ++d) squares = fma(load(x + d * W), load(x + d * W), squares);
    return root(squares) * broadcast(kNormSlack);
}

#if defined(SPARSE_ATTN_AMX)
SPARSE_ATTN_INLINE Vec nearest_bfloat16(Vec a) {
    return {
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a.v)), 16))};
}
#else
SPARSE_ATTN_INLINE Vec nearest_bfloat16(Vec a) {
    return a;
}
#endif

// Numbers to words of a few, the first lowest.
template <class Kind>
SPARSE_ATTN_INLINE void store_numbers(uint32_t* to, const Vec* numbers) {
#if defined(SPARSE_ATTN_AMX)
    if constexpr (kFloats<Kind>) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(numbers[0].v), 16);
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_castps_si512(numbers[1].v)));
        return;
    }
#endif
    constexpr uint32_t kMask = (1u << Kind::kBits) - 1;
#if defined(__AVX512F__)
    __m512i word = _mm512_setzero_si512();
    for (int i = Kind::kNumbers; i-- > 0;)
        word = _mm512_or_si512(_mm512_slli_epi32(word, Kind::kBits),
                               _mm512_and_si512(_mm512_maskz_cvtps_epi32(0xffff, numbers[i].v),
                                                _mm512_set1_epi32(static_cast<int>(kMask))));
    _mm512_storeu_si512(to, word);
#elif defined(__AVX2__)
    __m256i word = _mm256_setzero_si256();
    for (int i = Kind::kNumbers; i-- > 0;)
        word = _mm256_or_si256(
            _mm256_slli_epi32(word, Kind::kBits),
            _mm256_and_si256(_mm256_cvtps_epi32(numbers[i].v), _mm256_set1_epi32(static_cast<int>(kMask))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), word);
#elif defined(SPARSE_ATTN_NEON)
    uint32x4_t word = vdupq_n_u32(0);
    for (int i = Kind::kNumbers; i-- > 0;)
        word = vorrq_u32(vshlq_n_u32(word, Kind::kBits),
                         vandq_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(numbers[i].v)), vdupq_n_u32(kMask)));
    vst1q_u32(to, word);
#else
    for (int j = 0; j < W; ++j) {
        to[j] = 0;
        for (int i = 0; i < Kind::kNumbers; ++i)
            to[j] |= (static_cast<uint32_t>(static_cast<int32_t>(numbers[i].v[j])) & kMask)
                     << (i * Kind::kBits);
    }
#endif
}

SPARSE_ATTN_INLINE Vec largest_of_columns(const float* x, int64_t head_dim) {
    Vec most = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        const Vec a = load(x + d * W);
        most = max(max(a, zero() - a), most);
    }
    return most;
}

// Where bytes are multiplied as matrices: of words w and w + 1 of the columns [w][width], W of them at a
// time, those of a column side by side.
#if defined(SPARSE_ATTN_NEON_BYTE_MATRICES)
inline void pair_words(uint32_t* words, int64_t width, int64_t word_count) {
    for (int64_t w = 0; w < word_count; w += 2)
        for (int64_t j = 0; j < width; j += W) {
            uint32_t *even = words + w * width + j, *odd = even + width;
            const uint32x4_t a = vld1q_u32(even), b = vld1q_u32(odd);
            vst1q_u32(even, vzip1q_u32(a, b));
            vst1q_u32(odd, vzip2q_u32(a, b));
        }
}
#else
SPARSE_ATTN_INLINE void pair_words(uint32_t*, int64_t, int64_t) {}
#endif

struct RoundedNorms {
    Vec norm, error;  // upper bounds of ‖x‖ and ‖x − scale · rounded‖
    Vec total;        // of the numbers
};

// to[w][width]: numbers, x / scale rounded; `x` is overwritten.
template <class Kind>
inline RoundedNorms round_columns(uint32_t* to, int64_t width, float* x, int64_t head_dim, Vec scale,
                                  Vec inverse) {
    const Vec least = broadcast(-Kind::kMost);
    Vec squares = zero(), errors = zero(), total = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        const Vec a = load(x + d * W);
        // max() gives its second operand for a NaN, whose row is used by nobody.
        const Vec number = kFloats<Kind> ? nearest_bfloat16(a * inverse)
                                         : zero() - max(zero() - max(round_even(a * inverse), least), least);
        const Vec error = a - scale * number;
        squares = fma(a, a, squares);
        errors = fma(error, error, errors);
        total = total + number;
        store(x + d * W, number);
    }
    for (int64_t w = 0; w < rounded_words<Kind>(head_dim); ++w) {
        Vec numbers[Kind::kNumbers];
        for (int i = 0; i < Kind::kNumbers; ++i) {
            const int64_t d = w * Kind::kNumbers + i;
            numbers[i] = d < head_dim ? load(x + d * W) : zero();
        }
        store_numbers<Kind>(to + w * width, numbers);
    }
    const Vec norm = root(squares) * broadcast(kNormSlack);
    return {norm, fma(norm, broadcast(0x1p-22f), root(errors) * broadcast(kNormSlack)), total};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
