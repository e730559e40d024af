// Selection through a key index: 8-bit rows of the keys with norms. A bound of what rounding can have changed
// says which keys cannot be among the best; the others are scored as decode_tile.h scores them.
//
// With μ the shift of a head, k̂ and q̂ the rounded k − μ and q, and s the sum that a tile makes of q and k:
//
//   |s − q·μ − q̂·k̂| ≤ ‖q − q̂‖·‖k − μ‖ + ‖q̂‖·‖k − μ − k̂‖ + rounding of s and of these numbers
//
// and q·μ is the same for all keys. All is divided by the scale of q.
#pragma once

#include "candidates.h"
#include "cpu/kernels/topk_decode.h"
#include "decode_tile.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int kIndexRows = 4;        // queries that meet a block at once
constexpr int64_t kIndexAhead = 12;  // blocks that are on their way from a paged index

// Bytes of four components of one query, for each word of a block.
struct RoundedQuery {
    float norm_factor, error_factor, rest;  // bound = norm · norm_factor + error · error_factor + rest
    int32_t start;                          // −128 · Σ of its numbers
    bool useful;

    // `query` is what tiles take, [D] with its sign; `words` [⌈D/4⌉].
    inline void fit(const float* query, const float* shift, int64_t head_dim, int32_t* words) {
        double largest = 0.0, norm = 0.0, shift_norm = 0.0, error = 0.0, rounded_norm = 0.0;
        for (int64_t d = 0; d < head_dim; ++d) {
            const double x = query[d], m = shift[d], size = __builtin_fabs(x);
            largest = size > largest ? size : largest;
            norm += x * x;  // NaN and infinity stay
            shift_norm += m * m;
        }
        norm = __builtin_sqrt(norm), shift_norm = __builtin_sqrt(shift_norm);
        useful =
            norm > 1e-15 && norm < 1e18 && shift_norm < 1e18;  // products stay far from the ends of float32
        if (!useful) return;
        const double scale = largest / 127.0;
        int32_t total = 0;
        for (int64_t d = 0; d < round_up(head_dim, 4); d += 4) {
            uint32_t word = 0;
            for (int64_t i = d; i < minimum(d + 4, head_dim); ++i) {
                const double x = query[i], whole = __builtin_rint(x / scale), near = whole * scale;
                error += (x - near) * (x - near);
                rounded_norm += near * near;
                total += static_cast<int32_t>(whole);
                word |= static_cast<uint32_t>(static_cast<int32_t>(whole) & 0xff) << (8 * (i - d));
            }
            words[d / 4] = static_cast<int32_t>(word);
        }
        error = __builtin_sqrt(error), rounded_norm = __builtin_sqrt(rounded_norm);
        // A sum of D products, each rounded once, twice where pairs are multiplied, and a dozen operations
        // here.
        const double unit = (2.0 * static_cast<double>(head_dim) + 32.0) * 0x1p-23;
        // What may be flushed to zero on the way.
        const double flushed = static_cast<double>(head_dim) * 0x1p-120;
        const double more = 1.0 + 1e-5;
        norm_factor = static_cast<float>((error + unit * (norm + error) + flushed) / scale * more);
        error_factor = static_cast<float>(rounded_norm / scale * more);
        rest = static_cast<float>((unit * norm * shift_norm + flushed * (1.0 + norm + shift_norm)) / scale *
                                  more);
        start = -128 * total;
    }
};

// The 16 keys of a block times R queries, in whole numbers: out[r][16]. `queries` is [R][words].
template <int R>
__attribute__((noinline)) void byte_products(const int8_t* block, int64_t words, const int32_t* queries,
                                             int64_t stride, const RoundedQuery* of, float* out) {
#if defined(__AVX512VNNI__)
    __m512i sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = _mm512_set1_epi32(of[r].start);
    const __m512i offset = _mm512_set1_epi8(-128);
    for (int64_t w = 0; w < words; ++w) {
        // The instruction takes unsigned by signed bytes: keys + 128.
        const __m512i keys = _mm512_xor_si512(_mm512_loadu_si512(block + w * 64), offset);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            sums[r] = _mm512_dpbusd_epi32(sums[r], keys, _mm512_set1_epi32(queries[r * stride + w]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        _mm512_storeu_ps(out + r * kIndexKeys, _mm512_maskz_cvtepi32_ps(0xffff, sums[r]));
#elif defined(__AVX2__)
    (void)of;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t half = 0; half < kIndexKeys;
         half += 8) {  // one after the other: their sums stay in registers
        __m256i sums[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_si256();
        for (int64_t w = 0; w < words; ++w) {
            const __m256i keys =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + w * 64 + half * 4));
            const __m256i sizes = _mm256_abs_epi8(keys);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                // |k| times q with the sign of k: pairs sum to at most 2·127², which 16 bits hold.
                const __m256i query = _mm256_sign_epi8(_mm256_set1_epi32(queries[r * stride + w]), keys);
                const __m256i pairs = _mm256_maddubs_epi16(sizes, query);
                sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            _mm256_storeu_ps(out + r * kIndexKeys + half, _mm256_cvtepi32_ps(sums[r]));
    }
#elif defined(SPARSE_ATTN_NEON)
    (void)of;
    int32x4_t sums[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = vdupq_n_s32(0);
    for (int64_t w = 0; w < words; ++w) {
        int8x16_t keys[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) keys[i] = vld1q_s8(block + w * 64 + i * 16);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const int8x16_t query = vreinterpretq_s8_s32(vld1q_dup_s32(queries + r * stride + w));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[r][i] = add_byte_products(query, keys[i], sums[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_f32(out + r * kIndexKeys + i * 4, vcvtq_f32_s32(sums[r][i]));
#else
    (void)of;
    for (int r = 0; r < R; ++r) {
        int32_t sums[kIndexKeys] = {};
        for (int64_t w = 0; w < words; ++w) {
            const uint32_t four = static_cast<uint32_t>(queries[r * stride + w]);
            for (int i = 0; i < 4; ++i) {
                const int32_t x = static_cast<int8_t>(four >> (8 * i));
                for (int j = 0; j < kIndexKeys; ++j) sums[j] += x * block[w * 64 + j * 4 + i];
            }
        }
        for (int j = 0; j < kIndexKeys; ++j) out[r * kIndexKeys + j] = static_cast<float>(sums[j]);
    }
#endif
}

// The keys that may be among the best of one query, while blocks stream past in ascending order.
struct Survivors {
    float *low, *high;  // [room + slack]: the score is between them
    int32_t* indices;
    int32_t count, keep;
    float threshold;  // `keep` keys have at least this score

    // The marked keys of a vector, the first of which is `first`.
    SPARSE_ATTN_INLINE void add(uint32_t bits, Vec lowest, Vec highest, int32_t first) {
        append(high + count, indices + count, bits, highest, first);
        count += append(low + count, indices + count, bits, lowest, first);
    }

    // Drops what cannot be among the best. `order` is scratch of the same length.
    inline void cut(int32_t* order) {
        if (count < keep) return;
        const int32_t padded = static_cast<int32_t>(round_up(count, W));
        for (int32_t i = 0; i < count; i += W) order_keys(low + i, order + i);
        for (int32_t i = count; i < padded; ++i) order[i] = INT32_MIN;
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (int32_t i = 0; i < count; ++i) {
            least = minimum(least, order[i]);
            most = maximum(most, order[i]);
        }
        // A number that `keep` of them reach, and few more: the closer, the better the threshold.
        int32_t reached = count;
        for (int step = 0; least != most && reached > keep + keep / 16; ++step) {
            const uint32_t distance = static_cast<uint32_t>(most) - static_cast<uint32_t>(least);
            int32_t middle =
                static_cast<int32_t>(static_cast<uint32_t>(least) + distance / 2 + (distance & 1));
            // The middle of the scores is nearer, as they lie; every other step halves whatever there is.
            const int32_t nearer = order_of(0.5f * float_of_order(least) + 0.5f * float_of_order(most));
            if (step % 2 == 0 && nearer > least && nearer <= most) middle = nearer;
            const int32_t n = count_ge(order, padded, middle);
            if (n >= keep) {
                least = middle;
                reached = n;
            } else {
                most = middle - 1;
            }
        }
        threshold = float_of_order(least);
        int32_t n = 0;
        for (int32_t i = 0; i < count; i += W) {
            const uint32_t bits = not_le(load(high + i), broadcast(threshold)) & low_bits(count - i);
            compress_to(high + n, order, bits, high + i, order + i);  // the order has served
            n += compress_to(low + n, indices + n, bits, low + i, indices + i);
        }
        count = n;
    }
};

// Room for the survivors of one query; where they are more, the bounds are of no use.
SPARSE_ATTN_INLINE int64_t survivor_room(int64_t keep) {
    return round_up(4 * keep + 512, W);
}

// scores[i] = what a tile makes of the query [words] and the key indices[i], which lies at row(indices[i]),
// for n <= room of them; whole vectors are written.
template <class T, class Tile, class Row>
inline void listed_scores(const Row& row, int64_t head_dim, const float* query, const int32_t* indices,
                          int64_t n, float* scores) {
    const int64_t word_count = (head_dim + Tile::kDepth - 1) / Tile::kDepth;
    const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; i += W) {
        for (int64_t j = i + W; j < minimum(n, i + 2 * W); ++j)
            for (int64_t at = 0; at < row_bytes; at += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(row(indices[j])) + at);
        const T* rows[W];
        for (int64_t j = 0; j < W; ++j) rows[j] = row(indices[minimum(i + j, n - 1)]);
        Vec total = zero();
        for (int64_t w = 0; w < word_count; w += W) {
            const int64_t count = minimum<int64_t>(W, word_count - w);
            Vec block[W];
            if ((w + W) * Tile::kDepth <= head_dim) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) block[j] = load_words<Tile>(rows[j], w);
            } else {
                for (int64_t j = 0; j < W; ++j) block[j] = load_words_n<Tile>(rows[j], w, count, head_dim);
            }
            transpose(block);
            for (int64_t c = 0; c < count; ++c) total = Tile::multiply_add(query + w + c, block[c], total);
        }
        store(scores + i, total);
    }
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
