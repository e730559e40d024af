// Kernels with one fault each, by number, and two without: what the simulated device must find, and must not.
#include "cuda/kernels/lib/device.cuh"

namespace sparse_attn::cuda {
namespace {

enum Case {
    kCorrect,
    kMissingBarrier,
    kMissingBarrierBeforeReuse,
    kMissingWarpBarrier,
    kOutOfBounds,
    kOutOfSharedBounds,
    kUninitialised,
    kUninitialisedShared,
    kDivergentCollective,
    kBarrierNotReached,
    kMisaligned,
    kBlocksRace,
    kNoWaitForCopies,
    kNoBarrierAfterCopies,
    kCorrectCopies,
};

// in, out [threads of the grid]; each thread writes its left neighbour's number, in the block's circle
__global__ void faulty_kernel(const int* in, int* out, int fault) {
    int* shared = reinterpret_cast<int*>(dynamic_shared());
    const int n = blockDim.x, t = threadIdx.x, all = n * gridDim.x, i = blockIdx.x * n + t;
    if (fault == kDivergentCollective) {
        out[i] = t % 2 ? __shfl_xor_sync(kWarp, t, 1) : __shfl_sync(kWarp, t, 0);
        return;
    }
    if (fault == kBarrierNotReached && t == 3) return;
    if (fault == kOutOfBounds) out[all] = 0;
    if (fault == kBlocksRace) out[0] = t == 0 ? blockIdx.x : 0;
    if (fault == kMisaligned) out[i] = *reinterpret_cast<const long long*>(in + 1) != 0;
    if (fault == kUninitialised) out[i] = out[all - 1 - i];
    if (fault == kOutOfSharedBounds) shared[n] = 0;
    if (fault >= kNoWaitForCopies) {
        if (t % 4 == 0) copy_async_16(shared + t, in + i, 16);
        commit_copies();
        if (fault == kNoWaitForCopies) {
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        if (fault != kNoBarrierAfterCopies) __syncthreads();
        out[i] = shared[(t + n - 1) % n];
        return;
    }
    if (fault != kUninitialisedShared) shared[t] = in[i];
    if (fault == kMissingWarpBarrier) {
        out[i] = shared[t ^ 1];
        return;
    }
    if (fault != kMissingBarrier) __syncthreads();
    const int left = shared[(t + n - 1) % n];
    if (fault != kMissingBarrierBeforeReuse) __syncthreads();
    shared[t] = left;
    __syncwarp();
    out[i] = shared[t] + (shared[t ^ 1] & 0);
    if (fault == kCorrect) atomicAdd(out + all, 1);
}

}  // namespace

extern "C" const char* run_faulty(const int* in, int* out, int blocks, int threads, int fault) {
    return launch(faulty_kernel, blocks, threads, 4 * threads, 0, nullptr, in, out, fault);
}

}  // namespace sparse_attn::cuda
