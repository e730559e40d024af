// variable_width_embedding backward, the same for every launch: positions are sorted by row, so that a band
// is a range of places and a row a run of them, and every sum goes over places in order.
//
// 1. For each band with a projection: grad_out times the projection, a narrow row for each place.
// 2. Each run's rows are summed into the gradient of its table's row.
// 3. The gradient of a projection is a product over its band's places, in parts that are added in order.
#include "lib/embedding.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kLongRun = 64;  // places from which on a whole block sums a run

// How many of the sorted keys are below `key`.
__device__ __forceinline__ int64_t places_below(const EmbedParams& p, int64_t key) {
    int64_t low = 0, high = p.count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.keys[middle] < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// keys [N]
__global__ void embedding_keys_kernel(const EmbedParams p, int32_t* keys) {
    const int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (position >= p.count) return;
    const TokenPlace place = place_of(p, position);
    const int64_t key = place.band < 0 ? p.all_rows : p.bands[place.band].first + place.row;
    keys[position] = static_cast<int32_t>(key);
}

// Places of block x, columns of block y, band z.
template <class T>
__global__ void __launch_bounds__(kGemmThreads) project_back_kernel(const EmbedParams p) {
    const EmbedBand& band = p.bands[blockIdx.z];
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kGemmTile, D = p.embedding_dim;
    if (!band.back || column >= band.width) return;
    const int64_t begin = places_below(p, band.first), end = places_below(p, band.first + band.rows);
    const int64_t first = begin + static_cast<int64_t>(blockIdx.x) * kGemmTile;
    if (first >= end) return;
    const T* grad = static_cast<const T*>(p.grad_out);
    const T* projection = static_cast<const T*>(band.projection);
    GatheredGemm<T, false, true> gemm;
    gemm.run(
        dynamic_shared(), 0, D, grad, projection, whole_rows(grad, D, D, sizeof(T)),
        whole_rows(projection, band.width, band.width, sizeof(T)),
        [&](int64_t i) { return Line<T>{first + i < end ? grad + p.order[first + i] * D : nullptr, D}; },
        [&](int64_t k) {
            return Line<T>{k < D ? projection + k * band.width + column : nullptr, band.width - column};
        });
    gemm.each([&](int i, int j, float value) {
        if (first + i < end && column + j < band.width)
            band.back[(first + i - begin) * band.width + column + j] = value;
    });
}

// A run: places [first, last) of one row.
struct Run {
    int64_t first, last, row, begin;  // begin: of the band
    int band;                         // −1: no run begins there
};
__device__ __forceinline__ Run run_at(const EmbedParams& p, int64_t place) {
    Run run{place, place, 0, 0, -1};
    if (place >= p.count) return run;
    const int64_t key = p.keys[place];
    if (key >= p.all_rows || (place > 0 && p.keys[place - 1] == key)) return run;
    run.last = places_below(p, key + 1);
    run.band = 0;
    for (int b = 1; b < p.band_count; ++b)
        if (p.bands[b].first <= key && p.bands[b].rows > 0) run.band = b;
    run.row = key - p.bands[run.band].first;
    run.begin = p.bands[run.band].back ? places_below(p, p.bands[run.band].first) : 0;
    if (!p.bands[run.band].grad_table) run.band = -1;
    return run;
}

// Column `at` of places first, first + step, … of a run, summed.
template <class T>
__device__ __forceinline__ float sum_of(const EmbedParams& p, const Run& run, int64_t first, int64_t step,
                                        int64_t at) {
    const EmbedBand& band = p.bands[run.band];
    float sum = 0.f;
#pragma unroll 4
    for (int64_t place = first; place < run.last; place += step)
        sum += band.back ? band.back[(place - run.begin) * band.width + at]
                         : to_float(static_cast<const T*>(p.grad_out)[p.order[place] * p.embedding_dim + at]);
    return sum;
}

// A warp has the run that begins at its place, if one does; the block's warps share the long ones.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_runs_kernel(const EmbedParams p) {
    float* sums = reinterpret_cast<float*>(dynamic_shared());  // [kWarps, 32]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps;
    const Run own = run_at(p, first + warp);
    if (own.band >= 0 && own.last - own.first < kLongRun) {
        const EmbedBand& band = p.bands[own.band];
        for (int64_t at = lane; at < band.width; at += 32)
            static_cast<T*>(band.grad_table)[own.row * band.width + at] =
                from_float<T>(sum_of<T>(p, own, own.first, 1, at));
    }
    for (int w = 0; w < kWarps; ++w) {
        const Run run = run_at(p, first + w);
        if (run.band < 0 || run.last - run.first < kLongRun) continue;
        const EmbedBand& band = p.bands[run.band];
        for (int64_t start = 0; start < band.width; start += 32) {
            const int64_t at = start + lane;
            sums[threadIdx.x] = at < band.width ? sum_of<T>(p, run, run.first + warp, kWarps, at) : 0.f;
            __syncthreads();
            if (warp == 0 && at < band.width) {
                float sum = 0.f;
                for (int other = 0; other < kWarps; ++other) sum += sums[32 * other + lane];
                static_cast<T*>(band.grad_table)[run.row * band.width + at] = from_float<T>(sum);
            }
            __syncthreads();
        }
    }
}

// Rows (of D) and columns (of the width) of block x, part y of the band's places, band z.
template <class T>
__global__ void __launch_bounds__(kGemmThreads) projection_parts_kernel(const EmbedParams p) {
    const EmbedBand& band = p.bands[blockIdx.z];
    const int64_t D = p.embedding_dim, tiles = divide_up(band.width, kGemmTile);
    const int64_t row = blockIdx.x / tiles * kGemmTile, column = blockIdx.x % tiles * kGemmTile;
    if (!band.parts || row >= D) return;
    const int64_t begin = places_below(p, band.first), end = places_below(p, band.first + band.rows);
    const int64_t size = divide_up(divide_up(end - begin, kProjectionParts), kGemmDepth) * kGemmDepth;
    const int64_t first = begin + blockIdx.y * size, last = first + size < end ? first + size : end;
    const T* grad = static_cast<const T*>(p.grad_out);
    const T* table = static_cast<const T*>(band.table);
    GatheredGemm<T, true, true> gemm;
    gemm.run(
        dynamic_shared(), first, last, grad, table, whole_rows(grad, D, D, sizeof(T)),
        whole_rows(table, band.stride, band.width, sizeof(T)),
        [&](int64_t k) { return Line<T>{k < last ? grad + p.order[k] * D + row : nullptr, D - row}; },
        [&](int64_t k) {
            return Line<T>{k < last ? table + (p.keys[k] - band.first) * band.stride + column : nullptr,
                           band.width - column};
        });
    float* part = band.parts + blockIdx.y * D * band.width;
    gemm.each([&](int i, int j, float value) {
        if (row + i < D && column + j < band.width) part[(row + i) * band.width + column + j] = value;
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const EmbedParams p) {
    const EmbedBand& band = p.bands[blockIdx.y];
    const int64_t size = p.embedding_dim * band.width;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (!band.parts || at >= size) return;
    float sum = 0.f;
    for (int part = 0; part < kProjectionParts; ++part) sum += band.parts[part * size + at];
    static_cast<T*>(band.grad_projection)[at] = from_float<T>(sum);
}

template <class T>
const char* backward(const EmbedParams& p, int32_t device, void* stream) {
    int64_t widest_back = 0, widest_part = 0;
    bool tables = false;
    const char* error = nullptr;
    for (int b = 0; b < p.band_count; ++b) {
        const EmbedBand& band = p.bands[b];
        if (band.back && band.width > widest_back) widest_back = band.width;
        if (band.parts && band.width > widest_part) widest_part = band.width;
        tables = tables || band.grad_table;
        if (band.grad_table && !error)
            error = clear_memory(band.grad_table, band.rows * band.width * static_cast<int64_t>(sizeof(T)),
                                 device, stream);
    }
    const unsigned bands = static_cast<unsigned>(p.band_count);
    if (!error && widest_back && p.count) {
        const dim3 grid(static_cast<unsigned>(divide_up(p.count, kGemmTile)),
                        static_cast<unsigned>(divide_up(widest_back, kGemmTile)), bands);
        error = launch(project_back_kernel<T>, grid, kGemmThreads, GatheredGemm<T, false, true>::kShared,
                       device, stream, p);
    }
    if (!error && tables && p.count)
        error = launch(sum_runs_kernel<T>, static_cast<unsigned>(divide_up(p.count, kWarps)), kThreads,
                       4 * kThreads, device, stream, p);
    if (!error && widest_part) {
        const dim3 grid(
            static_cast<unsigned>(divide_up(p.embedding_dim, kGemmTile) * divide_up(widest_part, kGemmTile)),
            kProjectionParts, bands);
        error = launch(projection_parts_kernel<T>, grid, kGemmThreads, GatheredGemm<T, true, true>::kShared,
                       device, stream, p);
        const dim3 sums(static_cast<unsigned>(divide_up(p.embedding_dim * widest_part, kThreads)), bands);
        if (!error) error = launch(sum_parts_kernel<T>, sums, kThreads, 0, device, stream, p);
    }
    return error;
}

}  // namespace

const char* embedding_keys(const EmbedParams& p, int32_t* keys, int32_t device, void* stream) {
    if (p.count == 0) return nullptr;
    return launch(embedding_keys_kernel, static_cast<unsigned>(divide_up(p.count, kThreads)), kThreads, 0,
                  device, stream, p, keys);
}

const char* variable_width_embedding_backward(const EmbedParams& p, int32_t device, void* stream) {
    return with_type(p.dtype, [&](auto type) { return backward<decltype(type)>(p, device, stream); });
}

}  // namespace sparse_attn::cuda
