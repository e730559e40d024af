// A 64 × 64 tile of a product whose operands are gathered line by line: C[i, j] = Σ_k A[i, k] · B[k, j].
//
// Either operand lies in memory along k (a line is one i, or one j) or across it (a line is one k). Lines are
// found by a function, so any rows of any table may stand beside each other. Half types go through the tensor
// cores, float32 through fused multiply-adds; both sum in float32.
#pragma once

#include "device.cuh"

namespace sparse_attn::cuda {

constexpr int kGemmTile = 64, kGemmDepth = 32, kGemmThreads = 128;

// A line of an operand from the tile's first element on: `size` elements exist, zeros follow; null: all
// zeros.
template <class T>
struct Line {
    const T* start;
    int64_t size;
};

// One tile of an operand in shared memory: lines of 64 or 32 elements, an odd number of 16 bytes apart.
template <class T, bool kAcross>
struct OperandTile {
    static constexpr int kLines = kAcross ? kGemmDepth : kGemmTile;
    static constexpr int kLength = kAcross ? kGemmTile : kGemmDepth;
    static constexpr int kPitch = kLength * static_cast<int>(sizeof(T)) + 16;
    static constexpr int kBytes = kLines * kPitch;

    // Element (i, k) of A, (j, k) of B.
    __device__ static __forceinline__ const T* at(const unsigned char* tile, int outer, int k) {
        const int line = kAcross ? k : outer, place = kAcross ? outer : k;
        return reinterpret_cast<const T*>(tile + line * kPitch) + place;
    }
    // A thread has one place of some lines: these many, these apart.
    static constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kChunks = kLength / kPer;
    static constexpr int kStep = kGemmThreads / kChunks, kOwn = kLines / kStep;
    static_assert(kGemmThreads % kChunks == 0 && kLines % kStep == 0);

    // The thread's lines, found once where they are the same for every k.
    struct Lines {
        Line<T> line[kAcross ? 1 : kOwn];
    };
    template <class Find>
    __device__ static __forceinline__ Lines lines(const Find& line_of) {
        Lines found{};
        if constexpr (!kAcross) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) found.line[i] = line_of(threadIdx.x / kChunks + i * kStep);
        }
        return found;
    }

    // The tile from k on: without waiting where `aligned` (whole 16 bytes everywhere), else at once.
    template <class Find>
    __device__ static __forceinline__ void load(unsigned char* tile, int64_t k, const T* anything,
                                                bool aligned, const Lines& lines, const Find& line_of) {
        const int first = threadIdx.x % kChunks * kPer, number = threadIdx.x / kChunks;
        const int64_t at = kAcross ? first : k + first;
        unsigned char* to = tile + number * kPitch + first * static_cast<int>(sizeof(T));
        auto line = [&](int i) {
            if constexpr (kAcross) {
                return line_of(k + number + i * kStep);
            } else {
                return lines.line[i];
            }
        };
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const Line<T> own = line(i);
                const bool real = own.start != nullptr && at < own.size;
                copy_async_16(to + i * kStep * kPitch, real ? own.start + at : anything, real ? 16 : 0);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const Line<T> own = line(i);
            T* place = reinterpret_cast<T*>(to + i * kStep * kPitch);
#pragma unroll 1
            for (int e = 0; e < kPer; ++e)
                place[e] = own.start != nullptr && at + e < own.size ? own.start[at + e] : from_float<T>(0.f);
        }
    }
};

template <class T, bool kAAcross, bool kBAcross>
struct GatheredGemm {
    using A = OperandTile<T, kAAcross>;
    using B = OperandTile<T, kBAcross>;
    static constexpr int kStage = A::kBytes + B::kBytes;
    static constexpr int kShared = 2 * kStage;

    float sum[8][4];

    // k from `first` to `last`; all threads of the block together. line_a(i or k), line_b(j or k) give the
    // lines.
    template <class LinesA, class LinesB>
    __device__ __forceinline__ void run(unsigned char* shared, int64_t first, int64_t last, const T* any_a,
                                        const T* any_b, bool aligned_a, bool aligned_b, const LinesA& line_a,
                                        const LinesB& line_b) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
            for (int e = 0; e < 4; ++e) sum[n][e] = 0.f;
        const typename A::Lines lines_a = A::lines(line_a);
        const typename B::Lines lines_b = B::lines(line_b);
        auto load = [&](int64_t k, unsigned char* stage) {
            A::load(stage, k, any_a, aligned_a, lines_a, line_a);
            B::load(stage + A::kBytes, k, any_b, aligned_b, lines_b, line_b);
        };
        load(first, shared);
        commit_copies();
        int current = 0;
        for (int64_t k = first; k < last; k += kGemmDepth, current ^= 1) {
            if (k + kGemmDepth < last) load(k + kGemmDepth, shared + (current ^ 1) * kStage);
            commit_copies();
            wait_copies<1>();
            __syncthreads();
            multiply(shared + current * kStage, shared + current * kStage + A::kBytes);
            __syncthreads();
        }
        wait_copies<0>();
    }

    // store(i, j, C[i, j]) for each of the thread's elements
    template <class Store>
    __device__ __forceinline__ void each(const Store& store) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (sizeof(T) == 2) {
                    store(16 * warp + lane / 4 + e / 2 * 8, 8 * n + lane % 4 * 2 + e % 2, sum[n][e]);
                } else {
                    store(threadIdx.x / 16 + 8 * n, threadIdx.x % 16 + 16 * e, sum[n][e]);
                }
            }
    }

  private:
    __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile) {
        if constexpr (sizeof(T) == 2) {
            const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, low = lane / 8 % 2 * 8;
            const int high = lane / 16 * 8, row = lane % 8;
#pragma unroll
            for (int k = 0; k < kGemmDepth; k += 16) {
                uint32_t a[4];
                // As load_matrices takes addresses: a line's start for each of its eight rows.
                load_matrices<kAAcross>(a, kAAcross ? A::at(a_tile, 16 * warp + low, k + high + row)
                                                    : A::at(a_tile, 16 * warp + low + row, k + high));
#pragma unroll
                for (int n = 0; n < 8; n += 2) {
                    uint32_t b[4];
                    load_matrices<kBAcross>(b, kBAcross ? B::at(b_tile, 8 * n + high, k + low + row)
                                                        : B::at(b_tile, 8 * n + high + row, k + low));
                    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                    mma_16x8x16<std::is_same_v<T, BFloat>>(sum[n], a, left);
                    mma_16x8x16<std::is_same_v<T, BFloat>>(sum[n + 1], a, right);
                }
            }
        } else {
#pragma unroll 4
            for (int k = 0; k < kGemmDepth; ++k) {
                float b[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) b[e] = *B::at(b_tile, threadIdx.x % 16 + 16 * e, k);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float a = *A::at(a_tile, threadIdx.x / 16 + 8 * n, k);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[n][e] = fmaf(a, b[e], sum[n][e]);
                }
            }
        }
    }
};

}  // namespace sparse_attn::cuda
