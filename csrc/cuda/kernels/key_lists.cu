// The inverse of `indices`, the same for every launch: for each key, where it is selected (a counting sort).
#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kListThreads = 256;

// Returns the count before. Of 64 bits: a key may be named many times over.
__device__ __forceinline__ int64_t count_up(int64_t* count) {
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(count), 1ull));
}

// The queries that block x of KeyLists counts.
struct QueryRange {
    int64_t first, last;
};
__device__ __forceinline__ QueryRange query_range(const AttendParams& p, int64_t blocks) {
    const int64_t size = (p.query_length + blocks - 1) / blocks, first = blockIdx.x * size;
    return {first, first + size < p.query_length ? first + size : p.query_length};
}

// counts [B·G, blocks, Tk], zeros before; grid (blocks, B·G)
__global__ void count_keys_kernel(const AttendParams p, const KeyLists lists) {
    const int64_t n = blockIdx.y, b = n / p.groups, group = n % p.groups;
    const QueryRange range = query_range(p, lists.blocks);
    int64_t* counts = lists.counts + (n * lists.blocks + blockIdx.x) * p.key_length;
    for (int64_t t = range.first; t < range.last; ++t) {
        const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, b, group, t);
        for (int64_t slot = threadIdx.x; slot < p.slots; slot += blockDim.x) {
            const int32_t j = indices[slot];
            if (j >= 0 && j < p.key_length) count_up(counts + j);
        }
    }
}

// Each count becomes the sum of those before it in its key, and starts[j + 1] the key's own sum.
// grid (⌈Tk / threads⌉, B·G)
__global__ void sum_blocks_kernel(const AttendParams p, const KeyLists lists) {
    const int64_t n = blockIdx.y, j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= p.key_length) return;
    int64_t* counts = lists.counts + n * lists.blocks * p.key_length + j;
    int64_t sum = 0;
    for (int64_t i = 0; i < lists.blocks; ++i) {
        const int64_t count = counts[i * p.key_length];
        counts[i * p.key_length] = sum;
        sum += count;
    }
    lists.starts[n * (p.key_length + 1) + j + 1] = sum;
}

// The inclusive sums of starts[1 …] in place, and starts[0] = 0; grid (B·G), a chunk of keys at a time.
__global__ void sum_keys_kernel(const AttendParams p, const KeyLists lists) {
    int64_t* starts = lists.starts + blockIdx.x * (p.key_length + 1);
    int64_t* warp_sums = reinterpret_cast<int64_t*>(dynamic_shared());  // [warps]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int64_t before = 0;
    if (threadIdx.x == 0) starts[0] = 0;
    for (int64_t first = 1; first <= p.key_length; first += blockDim.x) {
        const int64_t at = first + threadIdx.x;
        int64_t sum = at <= p.key_length ? starts[at] : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int64_t other = __shfl_up_sync(kWarp, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == 31) warp_sums[warp] = sum;
        __syncthreads();
        int64_t chunk = 0;
        for (int w = 0; w < warps; ++w) {
            if (w < warp) sum += warp_sums[w];
            chunk += warp_sums[w];
        }
        if (at <= p.key_length) starts[at] = before + sum;
        before += chunk;
        __syncthreads();
    }
}

// A block takes its queries one after the other. Within a query only a key that it names twice is counted up
// twice, and both entries are that query, or places with the same score: the order of the threads changes
// nothing. grid (blocks, B·G)
__global__ void list_queries_kernel(const AttendParams p, const KeyLists lists, const bool places) {
    const int64_t n = blockIdx.y, b = n / p.groups, group = n % p.groups;
    const QueryRange range = query_range(p, lists.blocks);
    int64_t* counts = lists.counts + (n * lists.blocks + blockIdx.x) * p.key_length;
    const int64_t* starts = lists.starts + n * (p.key_length + 1);
    int32_t* queries = lists.queries + n * p.query_length * p.slots;
    for (int64_t t = range.first; t < range.last; ++t) {
        const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, b, group, t);
        for (int64_t slot = threadIdx.x; slot < p.slots; slot += blockDim.x) {
            const int32_t j = indices[slot];
            if (j >= 0 && j < p.key_length)
                queries[starts[j] + count_up(counts + j)] =
                    static_cast<int32_t>(places ? t * p.slots + slot : t);
        }
        __syncthreads();
    }
}

}  // namespace

// Enough blocks to fill a GPU; each costs a counter per key.
int64_t key_list_blocks(const AttendParams& p) {
    const int64_t selections = p.batch * p.groups, wanted = divide_up(512, selections > 0 ? selections : 1);
    const int64_t most = divide_up(p.query_length, 16);
    return wanted < most ? wanted : most > 0 ? most : 1;
}

const char* list_keys(const AttendParams& p, const KeyLists& lists, bool places, int32_t device,
                      void* stream) {
    const unsigned selections = static_cast<unsigned>(p.batch * p.groups);
    const dim3 by_query(static_cast<unsigned>(lists.blocks), selections);
    const dim3 by_key(static_cast<unsigned>(divide_up(p.key_length, kListThreads)), selections);
    const char* error =
        clear_memory(lists.counts, 8 * p.batch * p.groups * lists.blocks * p.key_length, device, stream);
    if (!error) error = launch(count_keys_kernel, by_query, kListThreads, 0, device, stream, p, lists);
    if (!error) error = launch(sum_blocks_kernel, by_key, kListThreads, 0, device, stream, p, lists);
    if (!error)
        error = launch(sum_keys_kernel, selections, kListThreads, 8 * kListThreads / 32, device, stream, p,
                       lists);
    if (!error)
        error = launch(list_queries_kernel, by_query, kListThreads, 0, device, stream, p, lists, places);
    return error;
}

}  // namespace sparse_attn::cuda
