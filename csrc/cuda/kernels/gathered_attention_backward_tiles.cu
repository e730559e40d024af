// gathered_attention backward on tensor cores: a block is one query and up to 64 heads that share its keys.
//
// As in the forward, keys and values of kTile slots are gathered by asynchronous copies while the tile before
// is worked on. With S the scores, P = softmax(S), dP = dO·Vᵀ and C = Σ dO·out − dLSE: dS = P·(dP − C)
// (with a soft cap whose tanh is t, dS has the factor 1 − t²).
// 1. A warp has 16 heads: S and dP of the tile, P and dS of it into shared memory, dQ += dS·K.
// 2. Of the tile's keys dK = dSᵀ·Q and dV = Pᵀ·dO, the heads summed by the tensor cores.
// What 2. gives goes to `partials`, a place of its own for each (query, slot), and a pass over the keys adds
// the places of each key in ascending order; or, with atomics, straight to the sums. Partials are bounded by
// taking the queries in chunks.
#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kRows = 16;  // heads of a warp
constexpr int kTile = 32;  // slots of a stage
constexpr int kStages = 2;
constexpr int kDim = 128;                        // at most, of D and Dv
constexpr int kColumns = 64;                     // of dK or dV that a warp works on at once
constexpr int kPitch = 2 * kTile + 16;           // of P and dS, in bytes: no bank conflicts
constexpr int64_t kPartialFloats = 128ll << 20;  // 512 MB
constexpr int kMostHeadWarps = 4;

// Where everything lies in shared memory, in bytes.
struct Layout {
    int D, Dv;  // rounded up to 16
    int key_pitch, value_pitch;
    int keys, values, ids, stage;  // of a stage: within it; `stage` is its size
    int query, grad, weights, changes, lse, centre, stages, size;
};
__host__ __device__ inline Layout layout_of(int head_dim, int value_dim, int head_warps) {
    Layout l;
    const int heads = head_warps * kRows;
    l.D = (head_dim + 15) / 16 * 16, l.Dv = (value_dim + 15) / 16 * 16;
    l.key_pitch = 2 * l.D + 16, l.value_pitch = 2 * l.Dv + 16;
    l.keys = 0, l.values = kTile * l.key_pitch, l.ids = l.values + kTile * l.value_pitch;
    l.stage = l.ids + 4 * kTile;
    l.query = 0, l.grad = heads * l.key_pitch, l.weights = l.grad + heads * l.value_pitch;
    l.changes = l.weights + heads * kPitch, l.lse = l.changes + heads * kPitch;
    l.centre = l.lse + 4 * heads, l.stages = l.centre + 4 * heads;
    l.size = l.stages + kStages * l.stage;
    return l;
}

inline int64_t head_tiles_per_set(const AttendParams& p) {
    return divide_up(heads_that_share(p), kMostHeadWarps * kRows);
}

// c [16, 8·kCount] += A [16, 16] · B [16, 8·kCount] with B [k, j] in shared memory along j; columns from
// `size` on are left out.
template <bool kBfloat, int kCount>
__device__ __forceinline__ void multiply_across(float (&c)[kCount][4], const uint32_t (&a)[4],
                                                const unsigned char* b_rows, int pitch, int size) {
    const int lane = threadIdx.x % 32;
    const unsigned char* from = b_rows + (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
        if (n * 8 >= size) break;
        uint32_t b[4];
        load_matrices<true>(b, from + n * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_16x8x16<kBfloat>(c[n], a, low);
        mma_16x8x16<kBfloat>(c[n + 1], a, high);
    }
}

// c [16, kTile] = A [16, size] · Bᵀ with rows of A (heads) and of B (slots) along k in shared memory.
template <bool kBfloat>
__device__ __forceinline__ void multiply_along(float (&c)[kTile / 8][4], const unsigned char* a_rows,
                                               const unsigned char* b_rows, int pitch, int size) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row8 = lane % 8;
    const unsigned char* a_from = a_rows + (matrix % 2 * 8 + row8) * pitch + matrix / 2 * 16;
    const unsigned char* b_from = b_rows + (matrix / 2 * 8 + row8) * pitch + matrix % 2 * 16;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
        for (int i = 0; i < 4; ++i) c[n][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
        if (k >= size) break;
        uint32_t a[4];
        load_matrices<false>(a, a_from + 2 * k);
#pragma unroll
        for (int n = 0; n < kTile / 8; n += 2) {
            uint32_t b[4];
            load_matrices<false>(b, b_from + n * 8 * pitch + 2 * k);
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_16x8x16<kBfloat>(c[n], a, low);
            mma_16x8x16<kBfloat>(c[n + 1], a, high);
        }
    }
}

// Tile n of head_tiles(part): those of the queries [first_query, first_query + part.query_length).
template <class T, bool kCapped>
__global__ void __launch_bounds__(32 * kMostHeadWarps, 2)
    attend_backward_tiles_kernel(const AttendGradients g, const Aligned aligned, const int head_warps,
                                 const int64_t first_query, const int64_t queries) {
    constexpr bool kBfloat = std::is_same_v<T, BFloat>;
    constexpr int kScores = kTile / 8, kOuts = kDim / 8;
    const AttendParams& p = g.forward;
    HeadTile tile;
    int64_t place;  // of the block's partials
    {
        AttendParams part = p;
        part.query_length = queries;
        tile = head_tile(part, blockIdx.x, head_warps * kRows);
        place = blockIdx.x / queries * g.chunk + tile.t;
        tile.t += first_query;
    }
    const int D = static_cast<int>(p.head_dim), Dv = static_cast<int>(p.value_dim), width = D + Dv;
    const Layout l = layout_of(D, Dv, head_warps);
    unsigned char* const shared = dynamic_shared();
    float* const row_lse = reinterpret_cast<float*>(shared + l.lse);
    float* const row_centre = reinterpret_cast<float*>(shared + l.centre);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = head_warps * kRows;
    const Scoring<kCapped> scoring(p.scale, p.softcap);
    const int64_t first_row = (tile.b * p.heads + tile.first) * p.query_length + tile.t;

    auto load_rows = [&](int to, int pitch, int chunks, int size, bool whole, const T* anything,
                         const auto& row_of_head) {
        for (int i = threadIdx.x; i < heads * chunks; i += blockDim.x) {
            const int h = i / chunks, at = i % chunks * kVector;
            load_chunk(shared + to + h * pitch + 2 * at, h < tile.count ? row_of_head(h) : nullptr, anything,
                       at, size, whole);
        }
    };
    const T* grads = static_cast<const T*>(g.grad_out);
    load_rows(l.query, l.key_pitch, l.D / kVector, D, aligned.query, static_cast<const T*>(p.query),
              [&](int h) { return row_of<T>(p.query, p.query_strides, tile.b, tile.first + h, tile.t); });
    load_rows(l.grad, l.value_pitch, l.Dv / kVector, Dv, aligned.grad_out, grads,
              [&](int h) { return grads + (first_row + h * p.query_length) * Dv; });
    // Each row's log-sum-exp in base 2 (infinite where there is nothing to sum: every weight is 0) and C.
    for (int h = warp; h < heads; h += head_warps) {
        const int64_t row = first_row + h * p.query_length;
        float sum = 0.f;
        if (h < tile.count)
            for (int d = lane; d < Dv; d += 32)
                sum = fmaf(to_float(grads[row * Dv + d]),
                           to_float(static_cast<const T*>(p.out)[row * Dv + d]), sum);
        for (int other = 1; other < 32; other *= 2) sum += __shfl_xor_sync(kWarp, sum, other);
        if (lane == 0) {
            const float lse = h < tile.count ? p.lse[row] : -INFINITY;
            row_lse[h] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            row_centre[h] = h < tile.count && g.grad_lse ? sum - g.grad_lse[row] : sum;
        }
    }

    const int widest = (l.D > l.Dv ? l.D : l.Dv) / kVector;
    int row_threads = 1;
    while (row_threads < widest) row_threads *= 2;
    const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, tile.b, tile.g, tile.t);
    auto gather = [&](int64_t first, unsigned char* stage) {
        const int at = threadIdx.x % row_threads * kVector;
        for (int i = threadIdx.x / row_threads; i < kTile; i += blockDim.x / row_threads) {
            const int64_t slot = first + i;
            const int32_t j = slot < p.slots ? indices[slot] : -1;
            const bool filled = j >= 0 && j < p.key_length;
            if (at == 0) reinterpret_cast<int32_t*>(stage + l.ids)[i] = filled ? j : -1;
            if (at < l.D)
                load_chunk(stage + l.keys + i * l.key_pitch + 2 * at,
                           filled ? row_of<T>(p.key, p.key_strides, tile.b, tile.kv, j) : nullptr,
                           static_cast<const T*>(p.key), at, D, aligned.key);
            if (at < l.Dv)
                load_chunk(stage + l.values + i * l.value_pitch + 2 * at,
                           filled ? row_of<T>(p.value, p.value_strides, tile.b, tile.kv, j) : nullptr,
                           static_cast<const T*>(p.value), at, Dv, aligned.value);
        }
    };

    // A lane has two rows (heads) of its warp's 16, lane / 4 and 8 below.
    float grad_query[kOuts][4];
#pragma unroll
    for (int n = 0; n < kOuts; ++n)
        for (int i = 0; i < 4; ++i) grad_query[n][i] = 0.f;

    auto weigh = [&](const unsigned char* stage) {
        float weight[kScores][4], change[kScores][4];
        multiply_along<kBfloat>(weight, shared + l.query + warp * kRows * l.key_pitch, stage + l.keys,
                                l.key_pitch, l.D);
        multiply_along<kBfloat>(change, shared + l.grad + warp * kRows * l.value_pitch, stage + l.values,
                                l.value_pitch, l.Dv);
        const int first = warp * kRows + lane / 4;
        const float lse[2] = {row_lse[first], row_lse[first + 8]};
        const float centre[2] = {row_centre[first], row_centre[first + 8]};
        const int32_t* ids = reinterpret_cast<const int32_t*>(stage + l.ids) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
            for (int i = 0; i < 4; ++i) {
                // Also of heads that are not there: zeros times infinite keys would be NaN.
                const bool filled = ids[8 * n + i % 2] >= 0 && lse[i / 2] != INFINITY;
                const float bent = scoring.bend(weight[n][i]);
                weight[n][i] = filled ? exp2f(scoring.score(bent) - lse[i / 2]) : 0.f;
                change[n][i] =
                    filled ? scoring.times_slope(weight[n][i] * (change[n][i] - centre[i / 2]), bent) : 0.f;
            }
            for (int r = 0; r < 2; ++r) {
                const int at = (first + 8 * r) * kPitch + 2 * (8 * n + lane % 4 * 2);
                *reinterpret_cast<uint32_t*>(shared + l.weights + at) =
                    pack<T>(weight[n][2 * r], weight[n][2 * r + 1]);
                *reinterpret_cast<uint32_t*>(shared + l.changes + at) =
                    pack<T>(change[n][2 * r], change[n][2 * r + 1]);
            }
        }
#pragma unroll
        for (int k = 0; k < kScores; k += 2) {
            const uint32_t a[4] = {pack<T>(change[k][0], change[k][1]), pack<T>(change[k][2], change[k][3]),
                                   pack<T>(change[k + 1][0], change[k + 1][1]),
                                   pack<T>(change[k + 1][2], change[k + 1][3])};
            multiply_across<kBfloat>(grad_query, a, stage + l.keys + k * 8 * l.key_pitch, l.key_pitch, l.D);
        }
    };

    // 16 slots from `slot` on, kColumns columns of dK or dV from `column` on.
    auto add_keys = [&](const unsigned char* stage, int64_t first, bool of_key, int slot, int column) {
        float sum[kColumns / 8][4];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
            for (int i = 0; i < 4; ++i) sum[n][i] = 0.f;
        const unsigned char* left = shared + (of_key ? l.changes : l.weights) +
                                    (lane / 16 * 8 + lane % 8) * kPitch + 2 * (slot + lane / 8 % 2 * 8);
        const int pitch = of_key ? l.key_pitch : l.value_pitch, size = of_key ? D : Dv;
        const unsigned char* right = shared + (of_key ? l.query : l.grad) + 2 * column;
        for (int h = 0; h < heads; h += 16) {
            uint32_t a[4];
            load_matrices<true>(a, left + h * kPitch);
            multiply_across<kBfloat>(sum, a, right + h * pitch, pitch, (of_key ? l.D : l.Dv) - column);
        }
        const float factor = of_key ? p.scale : 1.f;
        const int32_t* ids = reinterpret_cast<const int32_t*>(stage + l.ids);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = slot + lane / 4 + 8 * r;
            const int32_t j = ids[i];
            if (j < 0) continue;
            float* to = (g.atomics ? g.sums + ((tile.b * p.kv_heads + tile.kv) * p.key_length + j) * width
                                   : g.partials + (place * p.slots + first + i) * width) +
                        (of_key ? 0 : D) + column;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
                for (int e = 0; e < 2; ++e) {
                    const int at = 8 * n + lane % 4 * 2 + e;
                    if (column + at >= size) continue;
                    const float x = sum[n][2 * r + e] * factor;
                    if (g.atomics) {
                        atomicAdd(to + at, x);
                    } else {
                        to[at] = x;
                    }
                }
        }
    };

    if (p.slots > 0) gather(0, shared + l.stages);
    commit_copies();
    int current = 0;
    for (int64_t first = 0; first < p.slots; first += kTile, current ^= 1) {
        if (first + kTile < p.slots) gather(first + kTile, shared + l.stages + (current ^ 1) * l.stage);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const unsigned char* stage = shared + l.stages + current * l.stage;
        weigh(stage);
        __syncthreads();
        const int key_parts = (D + kColumns - 1) / kColumns, value_parts = (Dv + kColumns - 1) / kColumns;
        for (int task = warp; task < 2 * (key_parts + value_parts); task += head_warps) {
            const int part = task / 2;
            const bool of_key = part < key_parts;
            add_keys(stage, first, of_key, task % 2 * 16, (of_key ? part : part - key_parts) * kColumns);
        }
        __syncthreads();
    }
    wait_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int h = warp * kRows + lane / 4 + 8 * r;
        if (h >= tile.count) continue;
        T* to = static_cast<T*>(g.grad_query) + (first_row + h * p.query_length) * D;
#pragma unroll
        for (int n = 0; n < kOuts; ++n)
            for (int e = 0; e < 2; ++e) {
                const int at = 8 * n + lane % 4 * 2 + e;
                if (at < D) to[at] = from_float<T>(grad_query[n][2 * r + e] * p.scale);
            }
    }
}

// Key j of key head kv in batch entry b: the places of a chunk are added to `sums` (unless it is the first),
// and written as gradients if it is the last. grid (Tk, Hkv, B), a thread per column
template <class T>
__global__ void sum_places_kernel(const AttendGradients g, const int64_t tiles, const bool first,
                                  const bool last, const int64_t queries) {
    constexpr int kAhead = 4;
    const AttendParams& p = g.forward;
    const int64_t j = blockIdx.x, kv = blockIdx.y, b = blockIdx.z;
    const int D = static_cast<int>(p.head_dim), width = D + static_cast<int>(p.value_dim);
    const int64_t key = (b * p.kv_heads + kv) * p.key_length + j;
    const int64_t list = b * p.groups + (p.groups == 1 ? 0 : kv);
    const int64_t* starts = g.lists.starts + list * (p.key_length + 1) + j;
    const int32_t* places = g.lists.queries + list * queries * p.slots;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = first ? 0.f : g.sums[key * width + c];
        for (int64_t tile = 0; tile < tiles && !g.atomics; ++tile) {
            const float* from =
                g.partials + ((b * p.kv_heads + kv) * tiles + tile) * g.chunk * p.slots * width + c;
            for (int64_t n = starts[0]; n < starts[1]; n += kAhead) {
                float x[kAhead];
#pragma unroll
                for (int i = 0; i < kAhead; ++i)
                    x[i] = n + i < starts[1] ? from[static_cast<int64_t>(places[n + i]) * width] : 0.f;
#pragma unroll
                for (int i = 0; i < kAhead; ++i) sum += x[i];
            }
        }
        if (!last) {
            g.sums[key * width + c] = sum;
        } else if (c < D) {
            static_cast<T*>(g.grad_key)[key * D + c] = from_float<T>(sum);
        } else {
            static_cast<T*>(g.grad_value)[key * (width - D) + c - D] = from_float<T>(sum);
        }
    }
}

template <class T>
const char* backward_tiles(const AttendGradients& g, int32_t device, void* stream) {
    const AttendParams& p = g.forward;
    const int64_t share = heads_that_share(p), tiles = head_tiles_per_set(p);
    const int head_warps = share <= kRows ? 1 : share <= 2 * kRows ? 2 : kMostHeadWarps;
    const Layout l = layout_of(static_cast<int>(p.head_dim), static_cast<int>(p.value_dim), head_warps);
    const dim3 keys(static_cast<unsigned>(p.key_length), static_cast<unsigned>(p.kv_heads),
                    static_cast<unsigned>(p.batch));
    const unsigned columns = static_cast<unsigned>(divide_up(p.head_dim + p.value_dim, 32) * 32);
    const char* error = nullptr;
    if (g.atomics)
        error = clear_memory(g.sums, 4 * p.batch * p.kv_heads * p.key_length * (p.head_dim + p.value_dim),
                             device, stream);
    int64_t at = 0;
    do {
        const int64_t left = p.query_length - at, queries = left < g.chunk ? left : g.chunk;
        AttendParams part = p;
        part.query_length = queries;
        part.indices = p.indices + at * p.indices_strides.t;
        if (!error && queries > 0)
            error = with_cap(p.softcap, [&](auto capped) {
                return launch(attend_backward_tiles_kernel<T, capped.value>,
                              static_cast<unsigned>(head_tiles(part, head_warps * kRows)), 32 * head_warps,
                              l.size, device, stream, g, aligned_rows(p, g.grad_out), head_warps, at,
                              queries);
            });
        if (!error && !g.atomics && p.key_length > 0) error = list_keys(part, g.lists, true, device, stream);
        const bool first = at == 0 && !g.atomics, last = at + queries == p.query_length;
        if (!error && p.key_length > 0 && (last || !g.atomics))
            error = launch(sum_places_kernel<T>, keys, columns, 0, device, stream, g, tiles, first, last,
                           queries);
        at += queries;
    } while (!error && at < p.query_length);
    return error;
}

}  // namespace

bool gradients_on_tiles(const AttendParams& p) {
    return p.dtype != DType::kFloat32 && heads_that_share(p) >= kTileHeads && p.head_dim <= kDim &&
           p.value_dim <= kDim;
}

int64_t partial_floats(const AttendParams& p, int64_t chunk) {
    return p.batch * p.kv_heads * head_tiles_per_set(p) * chunk * p.slots * (p.head_dim + p.value_dim);
}

int64_t gradient_chunk(const AttendParams& p) {
    if (!gradients_on_tiles(p)) return p.query_length;
    const int64_t one = partial_floats(p, 1);
    const int64_t most = one > 0 ? kPartialFloats / one : p.query_length;
    // Places are numbered in 32 bits; a chunk of one query has fewer.
    const int64_t numbered = 2147483647 / (p.slots > 0 ? p.slots : 1);
    const int64_t wanted = most < numbered ? most : numbered;
    const int64_t chunk = wanted > 1 ? wanted : 1;
    return chunk < p.query_length ? chunk : p.query_length;
}

const char* gathered_attention_backward_tiles(const AttendGradients& g, int32_t device, void* stream) {
    return g.forward.dtype == DType::kBFloat16 ? backward_tiles<BFloat>(g, device, stream)
                                               : backward_tiles<Half>(g, device, stream);
}

}  // namespace sparse_attn::cuda
