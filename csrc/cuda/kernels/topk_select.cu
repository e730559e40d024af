// topk_select: exact, in one pass over the keys, with no score matrix in device memory.
//
// A block has 64 queries of one selection, their fragments in registers, and streams tiles of 64 keys through
// the tensor cores (float32: the others). A score that beats its query's running threshold is appended to the
// query's candidates, in the order of the keys; a row of candidates that runs full is cut to its best, which
// raises the threshold (lib/candidates.cuh). The first threshold comes from a sample of the keys, where there
// are many. What hides keys or keeps them always is looked at in the tiles
// that need it alone. Candidates belong to the blocks that a GPU runs at once, not to the queries: scratch
// does not grow with Tq.
//
// Few queries (decoding): the keys are in pieces, a block has one, and the best of all pieces are merged.
// Query heads with the same keys are rows of one block, which reads each key once for all of them.
//
// Heads that share a selection: topk_select_shared.cu.
#include "topk_select.h"

#include <cmath>

#include "lib/select_tile.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int64_t kCandidateBytes = 512ll << 20;  // at most
// Candidates of a row beyond its budget: twice as many where that is little, else about as many.
constexpr int64_t kLeastRoom = 128, kFewRoom = 1024, kMostRoom = 4096;
constexpr int64_t kLeastPiece = 512;   // keys
constexpr int64_t kMostMerged = 8192;  // candidates that a warp merges
constexpr int64_t kLeastSampled = 32;  // a smaller budget gains less than the sample costs

// Two 16-bit floats times the sign of `scale`: 0 makes them 0, what is not finite NaN.
template <class T>
__device__ __forceinline__ uint32_t times_sign(uint32_t pair, float scale) {
    if (scale > 0.f) return pair;
    if (scale < 0.f) return pair ^ 0x80008000u;
    constexpr uint32_t kExponent = std::is_same_v<T, BFloat> ? 0x7f80u : 0x7c00u;
    uint32_t result = 0;
    for (int half = 0; half < 32; half += 16)
        if ((pair >> half & kExponent) == kExponent) result |= 0x7fffu << half;
    return result;
}

// 64 queries in registers as fragments of m16n8k16, and tiles of 64 keys in shared memory.
template <class T, int kDim>
struct Product {
    static constexpr int kPitch = 2 * kDim + 16;  // an odd number of 16 bytes: no bank conflicts
    static constexpr int kBytes = kGemmTile * kPitch;
    static constexpr int kChunks = kDim / kVector, kLines = kGemmThreads / kChunks;

    uint32_t query[kDim / 16][4];

    // Where a key lies, such that each lane gets 16 keys in a row.
    __device__ static constexpr int place_of(int line) {
        return line % 16 / 2 * 8 + line / 16 * 2 + line % 2;
    }

    // Where the thread's part of the rows from `first` on begins.
    __device__ static __forceinline__ const T* part(const T* rows, int64_t stride, int64_t first) {
        return rows + (first + threadIdx.x / kChunks) * stride + threadIdx.x % kChunks * kVector;
    }
    // The next 64 rows, of which `count` exist, in the background; zeros past the end. from: the thread's
    // part of them, then of the rows after.
    __device__ static __forceinline__ void load(unsigned char* tile, const T*& from, const void* anything,
                                                int64_t stride, int count, int dim, bool aligned) {
        const int chunk = threadIdx.x % kChunks * kVector, line = threadIdx.x / kChunks;
        unsigned char* to = tile + place_of(line) * kPitch + 2 * chunk;
        if (aligned && dim == kDim && count >= kGemmTile) {
#pragma unroll
            for (int i = 0; i < kGemmTile; i += kLines) {
                copy_async_16(to + place_of(i) * kPitch, from, 16);
                from += kLines * stride;
            }
            return;
        }
#pragma unroll 1
        for (int i = 0; i < kGemmTile; i += kLines) {
            load_chunk(to + place_of(i) * kPitch, line + i < count ? from - chunk : nullptr,
                       static_cast<const T*>(anything), chunk, dim, aligned);
            from += kLines * stride;
        }
    }

    // A tile of queries; row(i): the i-th, or null.
    template <class Row>
    __device__ static __forceinline__ void load_queries(unsigned char* tile, const Row& row,
                                                        const void* anything, int dim, bool aligned) {
        const int chunk = threadIdx.x % kChunks * kVector, line = threadIdx.x / kChunks;
#pragma unroll 1
        for (int i = line; i < kGemmTile; i += kLines)
            load_chunk(tile + i * kPitch + 2 * chunk, row(i), static_cast<const T*>(anything), chunk, dim,
                       aligned);
    }

    // The fragments of a tile of queries, times the sign of the scale: ranks need no more of it.
    __device__ __forceinline__ void take(const unsigned char* tile, float scale) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const unsigned char* from = tile + (16 * warp + lane % 16) * kPitch + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
            load_matrices<false>(query[k], from + 32 * k);
#pragma unroll
            for (int i = 0; i < 4; ++i) query[k][i] = times_sign<T>(query[k][i], scale);
        }
    }

    __device__ __forceinline__ void multiply(float (&sum)[8][4], const unsigned char* tile) const {
        const int lane = threadIdx.x % 32;
        const unsigned char* from = tile + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            for (int e = 0; e < 4; ++e) sum[n][e] = 0.f;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t key[4];
                load_matrices<false>(key, from + 8 * n * kPitch + 32 * k);
                const uint32_t left[2] = {key[0], key[1]}, right[2] = {key[2], key[3]};
                mma_16x8x16<std::is_same_v<T, BFloat>>(sum[n], query[k], left);
                mma_16x8x16<std::is_same_v<T, BFloat>>(sum[n + 1], query[k], right);
            }
    }
};

// Blocks that a multiprocessor is to hold. Where it has 100 KB of shared memory (8.6, 8.9, 12.0) two fit.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ % 100 != 0 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksOf128 = 2;
#else
constexpr int kBlocksOf128 = 3;
#endif

// One selection per head, half types: D up to kDim. Persistent blocks.
template <class T, int kDim>
__global__ void __launch_bounds__(kGemmThreads, kDim <= 64    ? 3
                                                : kDim <= 128 ? kBlocksOf128
                                                              : 2)
    select_halves_kernel(const SelectCall call, const bool aligned_query, const bool aligned_key) {
    using P = Product<T, kDim>;
    const SelectParams& p = call.select;
    SelectShared& shared = *reinterpret_cast<SelectShared*>(dynamic_shared());
    Candidate* slots = block_slots(call);
    const int dim = static_cast<int>(p.head_dim), capacity = static_cast<int>(call.plan.capacity);
    for (int64_t n = blockIdx.x; n < works(call); n = shared.work.n + gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) shared.work = work_of(call, n);
        __syncthreads();
        const Work& work = shared.work;  // there, for registers are few
        unsigned char *current = dynamic_shared() + sizeof(SelectShared), *next = current + P::kBytes;
        const int rows_left = static_cast<int>(packed_rows(call) - work.first);
        P::load_queries(
            current,
            [&](int i) -> const T* {
                const unsigned row = work.first + i, length = static_cast<unsigned>(p.query_length);
                if (i >= rows_left) return nullptr;
                return row_of<T>(p.query, p.query_strides, work.b, work.group + row / length, row % length);
            },
            p.query, dim, aligned_query);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        P product;
        product.take(current, p.rule.scale);
        const bool idle = TileShape<T>::of_warp(0) >= rows_left;
        Rows<T> rows;
        rows.start(shared);
        // A sample, all keys with a threshold from it, and all keys without where that was too high.
        for (int stride = static_cast<int>(call.plan.stride);;) {
            __syncthreads();
            const SelectTile tile = select_tile(call, work, shared, stride);
            const int place = static_cast<int>(call.plan.sample_budget);
            if (stride > 1 && tile.end - tile.begin <= place + place / 4) {
                stride = 1;  // too few
                continue;
            }
            const T* keys = P::part(
                row_of<T>(p.key, p.key_strides, work.b, work.group / (p.heads / p.kv_heads), stride / 2),
                tile.apart, tile.begin);
            if (tile.begin < tile.end)
                P::load(current, keys, p.key, tile.apart, tile.end - tile.begin, dim, aligned_key);
            commit_copies();
            for (int key = tile.begin; key < shared.tile.end; key += kGemmTile) {
                wait_copies<0>();
                __syncthreads();
                const int left = shared.tile.end - key - kGemmTile;  // after this tile
                if (left > 0) P::load(next, keys, p.key, shared.tile.apart, left, dim, aligned_key);
                commit_copies();
                if (!idle) {
                    float sum[8][4];
                    product.multiply(sum, current);
                    rows.add(sum, key, shared.tile.plain(key), slots, capacity, shared);
                    const bool guessing = left <= 0 && stride > 1;
                    rows.cut_rows(slots, guessing ? place : capacity - kGemmTile, !guessing, shared);
                }
                unsigned char* const read = current;
                current = next, next = read;
            }
            wait_copies<0>();
            if (stride > 1) {
                rows.guess(shared);
                stride = 1;
            } else if (rows.guessed_too_high(shared)) {
                rows.start(shared);
            } else {
                break;
            }
        }
        write_best(call, work, slots, rows, shared);
    }
}

// The best of all pieces of the keys, a warp for each of `rows` queries.
__global__ void __launch_bounds__(kGemmThreads) merge_kernel(const SelectCall call, const int64_t rows) {
    const SelectParams& p = call.select;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t place = static_cast<int64_t>(blockIdx.x) * (kGemmThreads / 32) + warp;
    if (place >= rows) return;
    const int64_t b = place / p.query_length / p.rule.groups;
    const RowRule rule = row_rule(p, b, place % p.query_length, keys_of(call, b));
    const int count = static_cast<int>(call.plan.splits * p.top_k);
    const CandidateRow row{static_cast<const Candidate*>(call.parts) + place * count, 0, count, rule, true};
    int32_t* bins = reinterpret_cast<int32_t*>(dynamic_shared()) + kBins * warp;
    int32_t* out = p.indices + place * p.top_k;
    Chunk chunk;
    const Cut cut = find_cut(chunk, row, static_cast<int>(p.top_k), 0, bins);
    keep(chunk, row, cut, [&](int at, uint32_t, int32_t key) { out[at] = key; });
    for (int64_t at = cut.kept + lane; at < p.top_k; at += 32) out[at] = -1;
}

// Calls run(kernel, bytes of shared memory) with the kernel of a selection per head in half types.
template <class T, class Run>
auto with_halves_kernel(int64_t dim, const Run& run) {
    constexpr int64_t kOwn = sizeof(SelectShared);
    if (dim <= 64) return run(select_halves_kernel<T, 64>, kOwn + 2 * Product<T, 64>::kBytes);
    if (dim <= 128) return run(select_halves_kernel<T, 128>, kOwn + 2 * Product<T, 128>::kBytes);
    return run(select_halves_kernel<T, 256>, kOwn + 2 * Product<T, 256>::kBytes);
}
template <class Run>
auto with_halves_kernel(const SelectParams& p, const Run& run) {
    return p.dtype == DType::kBFloat16 ? with_halves_kernel<BFloat>(p.head_dim, run)
                                       : with_halves_kernel<Half>(p.head_dim, run);
}

bool is_gathered(const SelectParams& p) {
    return p.dtype == DType::kFloat32 || p.rule.groups < p.heads;
}

// A first threshold from every stride-th key: its score of place sample_budget there. Of the best K keys of a
// row K / stride are expected in the sample; the place lies four standard deviations beyond, so that of a
// hundred thousand rows in random order a few are done again. The stride is odd: keys often repeat with a
// power of two. benchmarks/gpu/streams.py has the same.
void sample_keys(SelectPlan& plan, int budget) {
    plan.stride = budget < 192 ? 63 : 21;
    const double expected = static_cast<double>(budget) / static_cast<double>(plan.stride);
    plan.sample_budget = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 3);
}

}  // namespace

SelectPlan select_plan(const SelectParams& p, int32_t device) {
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const int64_t budget = most(p.top_k, 1), rows = p.batch * p.rule.groups * p.query_length;
    SelectPlan plan{};
    // Few queries (decoding): those of all heads that have their keys in common are one tile.
    plan.packed = !is_gathered(p) && p.query_length < kGemmTile ? p.heads / p.kv_heads : 1;
    const int64_t tiles =
        most(p.batch * (p.rule.groups / plan.packed) * divide_up(plan.packed * p.query_length, kGemmTile), 1);
    // A row that no more keys than these can come to is never cut before its end.
    const int64_t room = least(most(most(least(2 * budget, kFewRoom), budget), kLeastRoom), kMostRoom);
    plan.capacity = least(budget + room, p.key_length) + kGemmTile;
    const int64_t block_bytes = kGemmTile * plan.capacity * static_cast<int64_t>(sizeof(Candidate));
    const int64_t held =
        is_gathered(p) ? gathered_blocks(p, device) : with_halves_kernel(p, [&](auto kernel, int64_t bytes) {
            return blocks_at_once(kernel, kGemmThreads, bytes, device);
        });
    const int64_t blocks = least(held, most(kCandidateBytes / block_bytes, 1));
    // A piece shorter than a few budgets would only copy its keys into the merge.
    const int64_t pieces =
        least(blocks / tiles, least(p.key_length / most(4 * budget, kLeastPiece), kMostMerged / budget));
    plan.splits = 1, plan.split_keys = p.key_length;
    if (pieces > 1) {
        plan.split_keys = divide_up(divide_up(p.key_length, pieces), kGemmTile) * kGemmTile;
        plan.splits = divide_up(p.key_length, plan.split_keys);
    }
    plan.stride = 1;
    if (!is_gathered(p) && plan.splits == 1 && budget >= kLeastSampled)
        sample_keys(plan, static_cast<int>(budget));
    plan.blocks = least(blocks, tiles * plan.splits);
    plan.candidate_bytes = plan.blocks * block_bytes;
    plan.part_bytes =
        plan.splits > 1 ? rows * plan.splits * budget * static_cast<int64_t>(sizeof(Candidate)) : 0;
    if (p.rule.groups < p.heads) {
        plan.lse_bytes = p.batch * p.heads * p.query_length * static_cast<int64_t>(sizeof(float));
        plan.lse_part_bytes = plan.splits > 1 ? 2 * plan.splits * plan.lse_bytes : 0;
    }
    return plan;
}

const char* topk_select(const SelectCall& call, int32_t device, void* stream) {
    const SelectParams& p = call.select;
    const int64_t rows = p.batch * p.rule.groups * p.query_length;
    if (rows * p.top_k == 0) return nullptr;
    const char* error =
        is_gathered(p)
            ? select_gathered(call, device, stream)
            : with_halves_kernel(p, [&](auto kernel, int64_t bytes) {
                  return launch(kernel, static_cast<unsigned>(call.plan.blocks), kGemmThreads, bytes, device,
                                stream, call, aligned_rows(p.query, p.query_strides, p.head_dim, p.dtype),
                                aligned_rows(p.key, p.key_strides, p.head_dim, p.dtype));
              });
    if (!error && call.plan.splits > 1)
        error = launch(merge_kernel, static_cast<unsigned>(divide_up(rows, kGemmThreads / 32)), kGemmThreads,
                       4 * kBins * (kGemmThreads / 32), device, stream, call, rows);
    return error;
}

}  // namespace sparse_attn::cuda
