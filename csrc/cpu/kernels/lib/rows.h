// Gathered rows: which slots of an index row are filled, dot products with the rows, weighted sums of the
// rows.
#pragma once

#include "common/params.h"
#include "convert.h"
#include "elementary.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Filled slots of one index row, in slot order: their key indices and their slots. Returns how many; whole
// vectors are written.
SPARSE_ATTN_INLINE int64_t filled_slots(const int32_t* indices, int64_t slots, int64_t low, int64_t high,
                                        int32_t* keys, int32_t* slot_of) {
    int64_t n = 0, s = 0;
    for (; s + Vec::W <= slots; s += Vec::W) {
        uint32_t bits = in_range(indices + s, static_cast<int32_t>(low), static_cast<int32_t>(high));
        if (!bits) continue;
        append_lanes(slot_of + n, bits, static_cast<int32_t>(s));
        n += compress_to(keys + n, bits, indices + s);
    }
    for (; s < slots; ++s)
        if (indices[s] >= low && indices[s] < high) {
            keys[n] = indices[s];
            slot_of[n++] = static_cast<int32_t>(s);
        }
    return n;
}

// Rows of T with a stride, looked up by key index. D > 0 fixes the width at compile time.
template <class T, int D>
struct Rows {
    const T* base;
    int64_t stride, runtime_width;

    SPARSE_ATTN_INLINE int64_t width() const { return D > 0 ? D : runtime_width; }
    SPARSE_ATTN_INLINE const T* row(int32_t key) const { return base + key * stride; }

    SPARSE_ATTN_INLINE Vec dot(const float* vector, const T* row) const {
        Vec acc = zero();
        int64_t d = 0;
        for (; d + Vec::W <= width(); d += Vec::W) acc = fma(load(row + d), load(vector + d), acc);
        if (d < width()) acc = fma(load_n(row + d, width() - d), load(vector + d), acc);
        return acc;
    }

    // out[i] = scale · (vector · row(keys[i])); `vector` is padded with zeros to whole vectors, `out`
    // likewise in room.
    SPARSE_ATTN_INLINE void dots(const float* vector, const int32_t* keys, int64_t n, float scale,
                                 float* out) const {
        for (int64_t i = 0; i < n; i += Vec::W) {
            Vec acc[Vec::W];
            if (i + Vec::W <= n) {
#pragma GCC unroll 16
                for (int j = 0; j < Vec::W; ++j) acc[j] = dot(vector, row(keys[i + j]));
            } else {
                for (int j = 0; j < Vec::W; ++j) acc[j] = i + j < n ? dot(vector, row(keys[i + j])) : zero();
            }
            store(out + i, transpose_sum(acc) * broadcast(scale));
        }
    }

    template <int N>
    SPARSE_ATTN_INLINE void add_columns(int64_t column, const float* weights, const int32_t* keys, int64_t n,
                                        float* out) const {
        Vec even[N], odd[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) even[v] = odd[v] = zero();
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
            const T *a = row(keys[i]) + column, *b = row(keys[i + 1]) + column;
            const Vec x = broadcast(weights[i]), y = broadcast(weights[i + 1]);
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) {
                even[v] = fma(x, load(a + v * Vec::W), even[v]);
                odd[v] = fma(y, load(b + v * Vec::W), odd[v]);
            }
        }
        if (i < n) {
            const T* a = row(keys[i]) + column;
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) even[v] = fma(broadcast(weights[i]), load(a + v * Vec::W), even[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) store(out + column + v * Vec::W, even[v] + odd[v]);
    }

    // out = Σ_i weights[i] · row(keys[i]); `out` has room for whole vectors.
    SPARSE_ATTN_INLINE void weighted_sum(const float* weights, const int32_t* keys, int64_t n,
                                         float* out) const {
        constexpr int kWide = 4;
        int64_t d = 0;
        for (; d + kWide * Vec::W <= width(); d += kWide * Vec::W)
            add_columns<kWide>(d, weights, keys, n, out);
        for (; d + Vec::W <= width(); d += Vec::W) add_columns<1>(d, weights, keys, n, out);
        if (d < width()) {
            Vec acc = zero();
            for (int64_t i = 0; i < n; ++i)
                acc = fma(broadcast(weights[i]), load_n(row(keys[i]) + d, width() - d), acc);
            store(out + d, acc);
        }
    }
};

// to += weight · from, `n` floats; both padded to whole vectors.
template <int D>
SPARSE_ATTN_INLINE void add_scaled(float* to, float weight, const float* from, int64_t n) {
    const Vec w = broadcast(weight);
#pragma GCC unroll 8
    for (int64_t d = 0; d < (D > 0 ? D : n); d += Vec::W) store(to + d, fma(w, load(from + d), load(to + d)));
}

// A vector of n elements as floats, zeros up to whole vectors.
template <class T>
SPARSE_ATTN_INLINE void load_padded(float* to, const T* from, int64_t n, int64_t stride) {
    load_row(to, from, n, stride);
    for (int64_t i = n; i < round_up(n, Vec::W); ++i) to[i] = 0.0f;
}

// Calls f.template operator()<T, D, Dv>() for the dtype, with the common widths fixed at compile time.
template <class F>
SPARSE_ATTN_INLINE void dispatch(DType dtype, int64_t head_dim, int64_t value_dim, const F& f) {
    auto with_type = [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        if (head_dim == 64 && value_dim == 64) return f.template operator()<T, 64, 64>();
        if (head_dim == 128 && value_dim == 128) return f.template operator()<T, 128, 128>();
        f.template operator()<T, 0, 0>();
    };
    if (dtype == DType::kFloat32) with_type(float{});
    if (dtype == DType::kBFloat16) with_type(bfloat16{});
    if (dtype == DType::kFloat16) with_type(float16{});
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
