// What the kernels of csrc/cuda use of CUDA, for a plain C++ compiler: the same source runs here thread by
// thread. csrc/cuda/kernels/lib/device.cuh includes this file where nvcc is not the compiler; runtime.cpp has
// the scheduler and the checks.
//
// Kernels are compiled with -fsanitize=thread, whose hooks runtime.cpp defines itself: every access to device
// or shared memory is looked at, without a word in the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace simt {

#define SIMT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

struct Place {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
    int lane;
};
const Place& here();

void block_barrier();
// Every lane of `mask` brings `size` (up to 64) bytes; returns 32 slots of 64 bytes, this warp's until its
// next collective. Lanes that meet at different operations, or with different masks, are an error.
const char* exchange(const char* operation, unsigned mask, const void* mine, size_t size);
void warp_barrier(unsigned mask);
void copy_async(void* to, const void* from, size_t size, size_t valid);
void commit_copies();
void wait_copies(unsigned pending);
unsigned char* dynamic_shared();
void atomic_access(const void* p, size_t size);
void check(bool holds, const char* what);
// Runs `thread` for every thread of every block; false after an error, whose text last_error() has.
bool launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
const char* last_error();
extern int64_t shared_limit;

template <class T>
T from_lane(const char* slots, int lane) {
    T value;
    std::memcpy(&value, slots + 64 * (lane & 31), sizeof value);
    return value;
}

}  // namespace simt

inline void __syncthreads() {
    simt::block_barrier();
}
inline void __syncwarp(unsigned mask = ~0u) {
    simt::warp_barrier(mask);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    return simt::from_lane<T>(simt::exchange("__shfl_xor_sync", mask, &value, sizeof value),
                              simt::here().lane ^ other);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return simt::from_lane<T>(simt::exchange("__shfl_sync", mask, &value, sizeof value), lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned steps) {
    const char* slots = simt::exchange("__shfl_up_sync", mask, &value, sizeof value);
    const int from = simt::here().lane - static_cast<int>(steps);
    return from < 0 ? value : simt::from_lane<T>(slots, from);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    const char* slots = simt::exchange("__ballot_sync", mask, &vote, sizeof vote);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && simt::from_lane<int>(slots, lane)) votes |= 1u << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) != 0;
}
template <class T, class Merge>
T simt_reduce(const char* name, unsigned mask, T value, const Merge& merge) {
    const char* slots = simt::exchange(name, mask, &value, sizeof value);
    for (int lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && lane != simt::here().lane)
            value = merge(value, simt::from_lane<T>(slots, lane));
    return value;
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return simt_reduce("__reduce_min_sync", mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return simt_reduce("__reduce_max_sync", mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return simt_reduce("__reduce_add_sync", mask, value, [](T a, T b) { return a + b; });
}
inline int __all_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) == mask;
}

template <class T>
SIMT_UNCHECKED T atomicAdd(T* p, T value) {
    simt::atomic_access(p, sizeof(T));
    const T old = *p;
    *p = old + value;
    return old;
}
template <class T>
SIMT_UNCHECKED T atomicMax(T* p, T value) {
    simt::atomic_access(p, sizeof(T));
    const T old = *p;
    *p = std::max(old, value);
    return old;
}
template <class T>
SIMT_UNCHECKED T atomicCAS(T* p, T expected, T value) {
    simt::atomic_access(p, sizeof(T));
    const T old = *p;
    if (old == expected) *p = value;
    return old;
}

inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
inline int __clz(int bits) {
    return bits ? __builtin_clz(bits) : 32;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
using std::max;
using std::min;

// ---- the runtime API, as far as csrc/cuda calls it

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = struct SimtStream*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? simt::last_error() : error ? "invalid argument" : "no error";
}
inline cudaError_t cudaGetLastError() {
    return *simt::last_error() ? cudaErrorLaunchFailure : cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(simt::shared_limit);
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
    return bytes > simt::shared_limit ? cudaErrorInvalidValue : cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    *blocks = 4;
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const bool done = simt::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                   [&] { kernel(arguments...); });
    return done ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaMemsetAsync(void* p, int byte, size_t size, cudaStream_t stream);

// ---- twins of the wrappers around PTX in csrc/cuda/kernels/lib/device.cuh

namespace sparse_attn::cuda {

inline unsigned char* dynamic_shared() {
    return simt::dynamic_shared();
}

inline void copy_async_16(void* to, const void* from, int valid) {
    simt::copy_async(to, from, 16, valid);
}
inline void commit_copies() {
    simt::commit_copies();
}
template <int kPending>
void wait_copies() {
    simt::wait_copies(kPending);
}

inline float half_value(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -tiny : tiny;
}
inline uint16_t half_bits(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;  // rounds to infinity
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
    uint32_t magnitude = bits & 0x7fffffff;
    magnitude += 0xfff + (magnitude >> 13 & 1);  // to nearest, ties to even
    return sign | static_cast<uint16_t>((magnitude >> 13) - (112u << 10));
}
inline float bfloat_value(uint16_t b) {
    return __uint_as_float(static_cast<uint32_t>(b) << 16);
}
inline uint16_t bfloat_bits(float value) {
    if (std::isnan(value)) return 0x7fff;
    uint32_t bits = __float_as_uint(value);
    bits += 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(bits >> 16);
}

inline float one_zero_one_nan(float x) {
    return std::isnan(x) ? __uint_as_float(0x7fffffffu) : x + 0.f;
}

template <class Pair>
void append_if(uint32_t condition, Pair* array, uint32_t& place, uint32_t first, uint32_t second) {
    const uint32_t words[2] = {first, second};
    if (!condition) return;
    std::memcpy(static_cast<void*>(array + place++), words, sizeof words);
}

template <bool kBfloat>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    std::memcpy(mine.a, a, sizeof a);
    std::memcpy(mine.b, b, sizeof b);
    const char* slots = simt::exchange("mma", ~0u, &mine, sizeof mine);
    const int lane = simt::here().lane;
    auto value = [](uint32_t pair, int half) {
        const uint16_t bits = half ? pair >> 16 : pair & 0xffff;
        return kBfloat ? bfloat_value(bits) : half_value(bits);
    };
    float rows[2][16], columns[2][16];  // of a and b: those of this lane's four elements
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; ++k) {
            const int from = k % 8 / 2, high = k >= 8;
            const char* of_a = slots + 64 * (lane / 4 * 4 + from) + 4 * (i + 2 * high);
            const char* of_b = slots + 64 * ((lane % 4 * 2 + i) * 4 + from) + 16 + 4 * high;
            rows[i][k] = value(*reinterpret_cast<const uint32_t*>(of_a), k & 1);
            columns[i][k] = value(*reinterpret_cast<const uint32_t*>(of_b), k & 1);
        }
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
    const char* slots = simt::exchange("ldmatrix", ~0u, &row, sizeof row);
    const int lane = simt::here().lane;
    for (int m = 0; m < 4; ++m) {
        uint32_t halves[2];
        for (int i = 0; i < 2; ++i) {
            const int pair = lane % 4 * 2 + i;
            const int from = kTransposed ? pair : lane / 4, column = kTransposed ? lane / 4 : pair;
            halves[i] = simt::from_lane<const uint16_t*>(slots, 8 * m + from)[column];
        }
        r[m] = halves[0] | halves[1] << 16;
    }
}

}  // namespace sparse_attn::cuda

// Last: the runtime API above has fields of these names.
#define threadIdx (simt::here().thread)
#define blockIdx (simt::here().block)
#define blockDim (simt::here().block_dim)
#define gridDim (simt::here().grid_dim)

#undef assert
#define assert(condition) simt::check(condition, #condition)
