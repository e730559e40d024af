// The inverse of `indices`, the same for every launch: for each key, where it is selected (a counting sort).
// Where the counts of all keys would take too much memory it is done for one range of keys after the other.
#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kListThreads = 256;
constexpr int64_t kCountBytes = 64ll << 20;  // at most, unless there are very many selections

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

// Keys [first, last) of KeyLists::range, whose counts are there at once.
struct KeyRange {
    int64_t first, last;

    __device__ __forceinline__ bool has(int64_t j) const { return j >= first && j < last; }
};

// counts [B·G, blocks, range], zeros before; grid (blocks, B·G)
__global__ void count_keys_kernel(const AttendParams p, const KeyLists lists, const KeyRange keys) {
    const int64_t n = blockIdx.y, b = n / p.groups, group = n % p.groups;
    const QueryRange range = query_range(p, lists.blocks);
    int64_t* counts = lists.counts + (n * lists.blocks + blockIdx.x) * lists.range - keys.first;
    for (int64_t t = range.first; t < range.last; ++t) {
        const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, b, group, t);
        for (int64_t slot = threadIdx.x; slot < p.slots; slot += blockDim.x) {
            const int32_t j = indices[slot];
            if (keys.has(j)) count_up(counts + j);
        }
    }
}

// Each count becomes the sum of those before it in its key, and starts[j + 1] the key's own sum.
// grid (⌈range / threads⌉, B·G)
__global__ void sum_blocks_kernel(const AttendParams p, const KeyLists lists, const KeyRange keys) {
    const int64_t n = blockIdx.y,
                  j = keys.first + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= keys.last) return;
    int64_t* counts = lists.counts + n * lists.blocks * lists.range + j - keys.first;
    int64_t sum = 0;
    for (int64_t i = 0; i < lists.blocks; ++i) {
        const int64_t count = counts[i * lists.range];
        counts[i * lists.range] = sum;
        sum += count;
    }
    lists.starts[n * (p.key_length + 1) + j + 1] = sum;
}

// starts[j + 1] of the range becomes the sum up to it, and starts[0] = 0; grid (B·G), a chunk of keys at a
// time.
__global__ void sum_keys_kernel(const AttendParams p, const KeyLists lists, const KeyRange keys) {
    int64_t* starts = lists.starts + blockIdx.x * (p.key_length + 1);
    int64_t* warp_sums = reinterpret_cast<int64_t*>(dynamic_shared());  // [warps]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int64_t before = keys.first > 0 ? starts[keys.first] : 0;
    if (keys.first == 0 && threadIdx.x == 0) starts[0] = 0;
    for (int64_t first = keys.first + 1; first <= keys.last; first += blockDim.x) {
        const int64_t at = first + threadIdx.x;
        int64_t sum = at <= keys.last ? starts[at] : 0;
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
        if (at <= keys.last) starts[at] = before + sum;
        before += chunk;
        __syncthreads();
    }
}

// A block takes its queries one after the other. Within a query only a key that it names twice is counted up
// twice, and both entries are that query, or places with the same score: the order of the threads changes
// nothing. grid (blocks, B·G)
__global__ void list_queries_kernel(const AttendParams p, const KeyLists lists, const KeyRange keys,
                                    const bool places) {
    const int64_t n = blockIdx.y, b = n / p.groups, group = n % p.groups;
    const QueryRange range = query_range(p, lists.blocks);
    int64_t* counts = lists.counts + (n * lists.blocks + blockIdx.x) * lists.range - keys.first;
    const int64_t* starts = lists.starts + n * (p.key_length + 1);
    int32_t* queries = lists.queries + n * p.query_length * p.slots;
    for (int64_t t = range.first; t < range.last; ++t) {
        const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, b, group, t);
        for (int64_t slot = threadIdx.x; slot < p.slots; slot += blockDim.x) {
            const int32_t j = indices[slot];
            if (keys.has(j))
                queries[starts[j] + count_up(counts + j)] =
                    static_cast<int32_t>(places ? t * p.slots + slot : t);
        }
        __syncthreads();
    }
}

}  // namespace

// Enough blocks to fill a GPU; each costs a counter per key, so that many keys have fewer blocks.
int64_t key_list_blocks(const AttendParams& p) {
    const int64_t selections = p.batch * p.groups > 0 ? p.batch * p.groups : 1;
    const int64_t counters = selections * (p.key_length > 0 ? p.key_length : 1);
    const int64_t there = kCountBytes / (8 * counters), least = divide_up(64, selections);
    int64_t wanted = divide_up(512, selections);
    if (wanted > there) wanted = there > least ? there : least;
    const int64_t most = divide_up(p.query_length, 16);
    return wanted < most ? wanted : most > 0 ? most : 1;
}

int64_t key_list_range(const AttendParams& p, int64_t blocks) {
    const int64_t there = kCountBytes / (8 * p.batch * p.groups * blocks + 1);
    const int64_t range = there / kListThreads > 0 ? there / kListThreads * kListThreads : kListThreads;
    return range < p.key_length ? range : p.key_length;
}

const char* list_keys(const AttendParams& p, const KeyLists& lists, bool places, int32_t device,
                      void* stream) {
    const unsigned selections = static_cast<unsigned>(p.batch * p.groups);
    const dim3 by_query(static_cast<unsigned>(lists.blocks), selections);
    const char* error = nullptr;
    for (int64_t first = 0; !error && first < p.key_length; first += lists.range) {
        const int64_t last = first + lists.range;
        const KeyRange keys{first, last < p.key_length ? last : p.key_length};
        const dim3 by_key(static_cast<unsigned>(divide_up(keys.last - first, kListThreads)), selections);
        error =
            clear_memory(lists.counts, 8 * p.batch * p.groups * lists.blocks * lists.range, device, stream);
        if (!error)
            error = launch(count_keys_kernel, by_query, kListThreads, 0, device, stream, p, lists, keys);
        if (!error)
            error = launch(sum_blocks_kernel, by_key, kListThreads, 0, device, stream, p, lists, keys);
        if (!error)
            error = launch(sum_keys_kernel, selections, kListThreads, 8 * kListThreads / 32, device, stream,
                           p, lists, keys);
        if (!error)
            error = launch(list_queries_kernel, by_query, kListThreads, 0, device, stream, p, lists, keys,
                           places);
    }
    return error;
}

}  // namespace sparse_attn::cuda
