// What every kernel uses beside plain CUDA: 16-bit floats as bits, thin wrappers around PTX, and one way to
// launch. Where nvcc is not the compiler, simt.h of the tests stands in for CUDA and has the same wrappers.
//
// Shared memory is dynamic throughout (dynamic_shared()), so that a launch says how much it takes.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

namespace sparse_attn::cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory without waiting: the first `valid` ones, the others become zero.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid)
                 : "memory");
}
// All copies since the last commit become one group.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float half_value(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t half_bits(float value) {
    return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float bfloat_value(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t bfloat_bits(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// x, a zero of either sign as +0 and any NaN as 0x7fffffff: what PTX has additions return.
__device__ __forceinline__ float one_zero_one_nan(float x) {
    return x + 0.f;
}

// c [16, 8] += a [16, 16] · b [16, 8], in the fragments of mma.m16n8k16.
template <bool kBfloat>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kBfloat) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Four 8 × 8 matrices of 16-bit elements in shared memory; lane i gives the address of row i % 8 of matrix i
// / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// If `condition` is not 0: two words become pair `place` of an array, and the place moves on. Without a
// branch, and without the copies of a pointer that plain code makes at every step.
template <class Pair>
__device__ __forceinline__ void append_if(uint32_t condition, Pair* array, uint32_t& place, uint32_t first,
                                          uint32_t second) {
    static_assert(sizeof(Pair) == 8);
    asm volatile(
        "{ .reg .pred p; .reg .u64 at; setp.ne.u32 p, %1, 0; cvt.u64.u32 at, %0; shl.b64 at, at, 3; add.u64 "
        "at, at, %4;"
        " @p st.global.v2.b32 [at], {%2, %3}; @p add.u32 %0, %0, 1; }"
        : "+r"(place)
        : "r"(condition), "r"(first), "r"(second), "l"(array)
        : "memory");
}

}  // namespace sparse_attn::cuda

#else
#include "simt.h"
#endif

namespace sparse_attn::cuda {

constexpr unsigned kWarp = 0xffffffffu;  // every lane

// 16-bit floats as they lie in memory.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ float to_float(Half value) {
    return half_value(value.bits);
}
__device__ __forceinline__ float to_float(BFloat value) {
    return bfloat_value(value.bits);
}
template <class T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else {
        T result;
        if constexpr (std::is_same_v<T, BFloat>) {
            result.bits = bfloat_bits(value);
        } else {
            result.bits = half_bits(value);
        }
        return result;
    }
}
// Two floats as a register of two 16-bit ones, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Launches kernel<<<grid, block, shared_bytes, stream>>>(arguments…) on GPU `device`; nullptr, or CUDA's
// message.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, int device,
                   void* stream, Arguments... arguments) {
    // This library has a CUDA runtime of its own (linked statically): it must be told the device too.
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess && shared_bytes > (48 << 10)) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config{
            grid, block, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream), nullptr, 0};
        error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    }
    if (error == cudaSuccess) error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of `threads` that the GPU holds at once.
template <class... Parameters>
int64_t blocks_at_once(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, int device) {
    int processors = 0, of_one = 0;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && shared_bytes > (48 << 10))
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, kernel, threads,
                                                              static_cast<size_t>(shared_bytes));
    const int64_t all = static_cast<int64_t>(processors) * of_one;
    return error == cudaSuccess && all > 0 ? all : 1;  // the launch will say what is wrong
}

// Zeros in `bytes` of memory.
inline const char* clear_memory(void* memory, int64_t bytes, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess && bytes > 0)
        error = cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__host__ __device__ inline int64_t divide_up(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

}  // namespace sparse_attn::cuda
