// What the attention kernels share: which heads stand together, and rows spread over the lanes of a warp.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/kernels/gathered_attention.h"
#include "device.cuh"

namespace sparse_attn::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kVector = 8;  // elements of a row that one lane holds

// Query heads [first, first + count) of query t in batch entry b, which share key head kv and selection g.
struct HeadTile {
    int64_t b, t, first, count, kv, g;
};
// Tile n of B · sets · ceil(share / size) · Tq: the queries of one tile of heads in turn, so that its keys
// stay in the caches.
__device__ __forceinline__ HeadTile head_tile(const AttendParams& p, int64_t n, int64_t size) {
    const int64_t sets = p.groups > p.kv_heads ? p.groups : p.kv_heads, share = p.heads / sets;
    const int64_t tiles = (share + size - 1) / size;
    HeadTile tile;
    tile.t = n % p.query_length, n /= p.query_length;
    const int64_t first = n % tiles * size;
    n /= tiles;
    tile.first = n % sets * share + first;
    tile.count = share - first < size ? share - first : size;
    tile.b = n / sets;
    tile.kv = tile.first / (p.heads / p.kv_heads);
    tile.g = tile.first / (p.heads / p.groups);
    return tile;
}
inline int64_t head_tiles(const AttendParams& p, int64_t size) {
    const int64_t share = heads_that_share(p);
    return p.batch * (p.heads / share) * divide_up(share, size) * p.query_length;
}

template <class T>
__device__ __forceinline__ const T* row_of(const void* tensor, const Strides& s, int64_t b, int64_t h,
                                           int64_t t) {
    return static_cast<const T*>(tensor) + b * s.b + h * s.h + t * s.t;
}

// Elements at … at + 7 of a row of `size`, zeros past its end. `aligned`: the row is of whole vectors, each
// on its 16 bytes.
template <class T>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const T* row, int at, int size,
                                            bool aligned) {
    if (aligned && at < size) {
        if constexpr (sizeof(T) == 4) {
            const float4 low = *reinterpret_cast<const float4*>(row + at);
            const float4 high = *reinterpret_cast<const float4*>(row + at + 4);
            x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
            x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        } else {
            const uint4 raw = *reinterpret_cast<const uint4*>(row + at);
            const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[2 * i] = to_float(T{static_cast<uint16_t>(pairs[i] & 0xffff)});
                x[2 * i + 1] = to_float(T{static_cast<uint16_t>(pairs[i] >> 16)});
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = at + i < size ? to_float(row[at + i]) : 0.f;
    }
}
// The reverse; rows that a kernel writes are contiguous.
template <class T>
__device__ __forceinline__ void store_vector(T* row, const float (&x)[kVector], int at, int size) {
    if constexpr (sizeof(T) == 2) {
        if (size % kVector == 0) {
            if (at < size)
                *reinterpret_cast<uint4*>(row + at) =
                    uint4{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
        if (at + i < size) row[at + i] = from_float<T>(x[i]);
}

// 8 elements of a row into shared memory; zeros past its end, and where `row` is null.
template <class T>
__device__ __forceinline__ void load_chunk(unsigned char* to, const T* row, const T* anything, int at,
                                           int size, bool aligned) {
    if (aligned) {
        const bool real = row != nullptr && at < size;
        copy_async_16(to, real ? row + at : anything, real ? 16 : 0);
        return;
    }
    uint32_t pairs[4] = {0, 0, 0, 0};
    if (row != nullptr)
        for (int i = 0; i < kVector; ++i)
            if (at + i < size) pairs[i / 2] |= static_cast<uint32_t>(row[at + i].bits) << 16 * (i % 2);
    *reinterpret_cast<uint4*>(to) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ void clear(float (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = 0.f;
}

// The dot product of two rows that lie on `lanes` lanes each (a power of two), on all of these lanes. The
// order of its sums is that of the lanes alone, so whoever computes a score gets the same bits.
__device__ __forceinline__ float row_dot(const float (&x)[kVector], const float (&y)[kVector], int lanes) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], y[i], sum);
    for (int other = 1; other < lanes; other *= 2) sum += __shfl_xor_sync(kWarp, sum, other);
    return sum;
}
__device__ __forceinline__ void add_scaled(float (&sum)[kVector], float factor, const float (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] = fmaf(factor, x[i], sum[i]);
}
__device__ __forceinline__ void scale_by(float (&x)[kVector], float factor) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] *= factor;
}

// exp2 relative to a row's maximum; of a row of −inf alone every term is 0.
__device__ __forceinline__ float exp2_below(float score, float maximum) {
    return exp2f(score - (maximum == -INFINITY ? 0.f : maximum));
}

// q·k as a score in base 2: scale · q·k, or with a soft cap cap · tanh(scale · q·k / cap).
template <bool kCapped>
struct Scoring {
    float factor, bound;

    __device__ __forceinline__ Scoring(float scale, float softcap)
        : factor(kCapped ? scale / softcap : scale * kLog2E), bound(softcap * kLog2E) {}
    // What score() and slope() are made of.
    __device__ __forceinline__ float bend(float product) const {
        return kCapped ? tanhf(product * factor) : product * factor;
    }
    __device__ __forceinline__ float score(float bent) const { return kCapped ? bent * bound : bent; }
    // weight · d score / d (scale · q·k)
    __device__ __forceinline__ float times_slope(float weight, float bent) const {
        return kCapped ? weight * fmaf(-bent, bent, 1.f) : weight;
    }
};

// Calls run(std::bool_constant) by whether there is a soft cap.
template <class Run>
const char* with_cap(float softcap, Run&& run) {
    return softcap > 0.f ? run(std::true_type()) : run(std::false_type());
}

// One more logit beside a row's online softmax: what was summed so far is to be scaled by the result.
__device__ __forceinline__ float add_sink(float sink, float& maximum, float& total) {
    const float most = fmaxf(maximum, sink), mine = exp2_below(maximum, most);
    maximum = most;
    total = total * mine + exp2_below(sink, most);
    return mine;
}

// Lanes of a warp that hold one row of D or of Dv elements.
inline int lanes_per_row(const AttendParams& p) {
    const int64_t most = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    int lanes = 1;
    while (lanes * kVector < most) lanes *= 2;
    return lanes;
}

// Whether every row of a tensor is made of whole vectors that lie on 16 bytes.
inline bool aligned_rows(const void* tensor, const Strides& s, int64_t size, DType dtype) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && size % kVector == 0 && s.b * bytes % 16 == 0 &&
           s.h * bytes % 16 == 0 && s.t * bytes % 16 == 0;
}
// Of query, key and value; of a backward also of what is contiguous [B, Hq, Tq, Dv], which may begin anywhere
// in its storage: a gradient can be a view of another tensor.
struct Aligned {
    bool query, key, value, out, grad_out;
};
inline Aligned aligned_rows(const AttendParams& p, const void* grad_out = nullptr) {
    const Strides whole{0, 0, p.value_dim, 1};
    return {aligned_rows(p.query, p.query_strides, p.head_dim, p.dtype),
            aligned_rows(p.key, p.key_strides, p.head_dim, p.dtype),
            aligned_rows(p.value, p.value_strides, p.value_dim, p.dtype),
            aligned_rows(p.out, whole, p.value_dim, p.dtype),
            aligned_rows(grad_out, whole, p.value_dim, p.dtype)};
}

// Calls run(T()) with the element type.
template <class Run>
const char* with_type(DType dtype, Run&& run) {
    switch (dtype) {
        case DType::kFloat32:
            return run(float());
        case DType::kBFloat16:
            return run(BFloat());
        default:
            return run(Half());
    }
}

}  // namespace sparse_attn::cuda
