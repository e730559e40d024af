// Attention of a few queries to keys in a row: those from one key on, each query as far as it sees. Every
// number is what a query alone gets (rows.h), by the same operations in the same order; each row of keys and
// values is read once for all of them.
#pragma once

#include "rows.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int kTogether = 4;  // queries

// How many keys a row of indices names where those are its first slots, in a row from its first key on; else
// 0.
SPARSE_ATTN_INLINE int64_t neighbours(const int32_t* row, int32_t slots, int32_t key_length) {
    int32_t filled = 0, in_place = 0, last = -1;
    for (int32_t n = 0; n < slots; ++n) {
        const bool own = row[n] == row[0] + n;
        filled += row[n] >= 0 && row[n] < key_length;
        in_place += own;
        last = maximum(last, own ? n : -1);
    }
    // As many in place as there are in all, the last of them behind all others: no gap.
    const bool first = slots > 0 && row[0] >= 0 && row[0] < key_length;
    return first && filled == in_place && last == filled - 1 ? filled : 0;
}

// Rows::dots with the rows first, first + 1, …, for kTogether vectors, padded to 16 floats; results `stride`
// apart.
template <class T, int D>
SPARSE_ATTN_INLINE void dots_together(const Rows<T, D>& rows, const float* vectors, int32_t first, int64_t n,
                                      float scale, float* out, int64_t stride) {
    constexpr int W = Vec::W;
    const int64_t width = D > 0 ? D : round_up(rows.width(), 16);
    for (int64_t i = 0; i < n; i += W) {
        Vec acc[kTogether][W];
        for (int j = 0; j < W; ++j) {
            Vec sums[kTogether];
#pragma GCC unroll 4
            for (int q = 0; q < kTogether; ++q) sums[q] = zero();
            if (i + j < n) {
                const T* row = rows.row(first + static_cast<int32_t>(i) + j);
                int64_t d = 0;
                for (; d + W <= rows.width(); d += W) {
                    const Vec own = load(row + d);
#pragma GCC unroll 4
                    for (int q = 0; q < kTogether; ++q)
                        sums[q] = fma(own, load(vectors + q * width + d), sums[q]);
                }
                if (d < rows.width()) {
                    const Vec own = load_n(row + d, rows.width() - d);
#pragma GCC unroll 4
                    for (int q = 0; q < kTogether; ++q)
                        sums[q] = fma(own, load(vectors + q * width + d), sums[q]);
                }
            }
#pragma GCC unroll 4
            for (int q = 0; q < kTogether; ++q) acc[q][j] = sums[q];
        }
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q)
            store(out + q * stride + i, transpose_sum(acc[q]) * broadcast(scale));
    }
}

// Sums of the even and of the odd rows, as Rows::weighted_sum has them: [kTogether, 2, width].
template <class T, int D>
struct SumsTogether {
    const Rows<T, D>& rows;
    float* sums;
    const float* weights;  // [kTogether, stride]
    int64_t stride;
    int32_t first;

    SPARSE_ATTN_INLINE float* even(int q) const { return sums + 2 * q * rows.width(); }

    // Adds rows [from, to), both even, of Q queries from q on.
    template <int Q, int N>
    SPARSE_ATTN_INLINE void add_columns(int q, int64_t from, int64_t to, int64_t column) const {
        constexpr int W = Vec::W;
        Vec acc[Q][2][N];
        const auto each = [&](const auto& use) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < Q; ++r)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
                    for (int v = 0; v < N; ++v)
                        use(acc[r][odd][v], even(q + r) + odd * rows.width() + column + v * W);
        };
        each([](Vec& a, float* at) __attribute__((always_inline)) { a = load(at); });
        for (int64_t i = from; i < to; i += 2) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const T* row = rows.row(first + static_cast<int32_t>(i) + odd) + column;
                Vec own[N];
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) own[v] = load(row + v * W);
#pragma GCC unroll 4
                for (int r = 0; r < Q; ++r) {
                    const Vec weight = broadcast(weights[(q + r) * stride + i + odd]);
#pragma GCC unroll 4
                    for (int v = 0; v < N; ++v) acc[r][odd][v] = fma(weight, own[v], acc[r][odd][v]);
                }
            }
        }
        each([](Vec& a, float* at) __attribute__((always_inline)) { store(at, a); });
    }
    template <int Q>
    SPARSE_ATTN_INLINE void add(int q, int64_t from, int64_t to) const {
        constexpr int W = Vec::W, N = W == 16 ? 2 : 1;  // as many as there are registers
        int64_t column = 0;
        for (; column + N * W <= rows.width(); column += N * W) add_columns<Q, N>(q, from, to, column);
        for (; column < rows.width(); column += W) add_columns<Q, 1>(q, from, to, column);
    }

    // results [kTogether, width] = Σ weights · rows of `counts` rows each. The width is whole vectors.
    SPARSE_ATTN_INLINE void make(const int64_t* counts, float* results) const {
        constexpr int64_t kBlock = 32;  // rows that stay in the first-level cache from column to column
        const int64_t width = rows.width();
        int64_t common = counts[0];
        for (int q = 1; q < kTogether; ++q) common = minimum(common, counts[q]);
        common &= ~int64_t{1};
        memset(sums, 0, static_cast<size_t>(kTogether * 2 * width) * 4);
        for (int64_t from = 0; from < common; from += kBlock)
            add<kTogether>(0, from, minimum(common, from + kBlock));
        for (int q = 0; q < kTogether; ++q) {
            const int64_t pairs = counts[q] & ~int64_t{1};
            if (pairs > common) add<1>(q, common, pairs);
            for (int64_t d = 0; d < width; d += Vec::W) {
                Vec total = load(even(q) + d);
                if (pairs < counts[q])
                    total = fma(broadcast(weights[q * stride + pairs]),
                                load(rows.row(first + static_cast<int32_t>(pairs)) + d), total);
                store(results + q * width + d, total + load(even(q) + width + d));
            }
        }
    }
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
