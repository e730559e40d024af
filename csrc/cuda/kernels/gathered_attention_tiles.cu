// gathered_attention forward on tensor cores: a block is one query and up to 64 heads that share its keys.
//
// Keys and values of kTile slots are gathered into shared memory by asynchronous copies while the tile before
// is worked on. A warp has 16 heads (mma.sync m16n8k16) and every other chunk of a tile's keys, or all of
// them; where two warps divide the keys of 16 heads, they merge at the end.
#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kRows = 16;  // heads of a warp
constexpr int kStages = 2;

// By the largest of D and Dv: what a warp's registers and the smallest shared memory (99 KB) hold.
template <int kDim>
struct Shape {
    static constexpr int kTile = kDim <= 128 ? 64 : 32;   // slots of a stage
    static constexpr int kChunk = kDim <= 128 ? 32 : 16;  // slots that a warp works on at once
    static constexpr int kHeadWarps = kDim <= 128 ? 4 : 2;
};

// Where everything lies in shared memory, in bytes. A row's pitch is an odd number of 16 bytes: no bank
// conflicts.
struct Layout {
    int D, Dv;  // rounded up to 16
    int key_pitch, value_pitch;
    int keys, values, ids, stage;  // of a stage: within it; `stage` is its size
    int query, stages, size;
};
__host__ __device__ inline Layout layout_of(int head_dim, int value_dim, int head_warps, int tile) {
    Layout l;
    l.D = (head_dim + 15) / 16 * 16, l.Dv = (value_dim + 15) / 16 * 16;
    l.key_pitch = 2 * l.D + 16, l.value_pitch = 2 * l.Dv + 16;
    l.keys = 0, l.values = tile * l.key_pitch, l.ids = l.values + tile * l.value_pitch;
    l.stage = l.ids + 4 * tile;
    l.query = 0, l.stages = head_warps * kRows * l.key_pitch;
    l.size = l.stages + kStages * l.stage;
    return l;
}

template <class T, int kDim, bool kCapped>
__global__ void __launch_bounds__(32 * Shape<kDim>::kHeadWarps)
    attend_tiles_kernel(const AttendParams p, const Aligned aligned, const int head_warps) {
    constexpr int kTile = Shape<kDim>::kTile, kChunk = Shape<kDim>::kChunk;
    constexpr int kScores = kChunk / 8, kOuts = kDim / 8;
    constexpr bool kBfloat = std::is_same_v<T, BFloat>;
    const HeadTile tile = head_tile(p, blockIdx.x, head_warps * kRows);
    const Layout l =
        layout_of(static_cast<int>(p.head_dim), static_cast<int>(p.value_dim), head_warps, kTile);
    unsigned char* const shared = dynamic_shared();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int head_warp = warp % head_warps, part = warp / head_warps, parts = warps / head_warps;
    const int matrix = lane / 8, row8 = lane % 8;  // as load_matrices takes addresses
    const Scoring<kCapped> scoring(p.scale, p.softcap);

    for (int i = threadIdx.x; i < head_warps * kRows * (l.D / kVector); i += blockDim.x) {
        const int h = i / (l.D / kVector), at = i % (l.D / kVector) * kVector;
        const T* row =
            h < tile.count ? row_of<T>(p.query, p.query_strides, tile.b, tile.first + h, tile.t) : nullptr;
        load_chunk(shared + l.query + h * l.key_pitch + 2 * at, row, static_cast<const T*>(p.query), at,
                   static_cast<int>(p.head_dim), aligned.query);
    }

    // The threads of one row of a tile are the next power of two of its chunks.
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
            if (at == 0) reinterpret_cast<int32_t*>(stage + l.ids)[i] = filled;
            if (at < l.D)
                load_chunk(stage + l.keys + i * l.key_pitch + 2 * at,
                           filled ? row_of<T>(p.key, p.key_strides, tile.b, tile.kv, j) : nullptr,
                           static_cast<const T*>(p.key), at, static_cast<int>(p.head_dim), aligned.key);
            if (at < l.Dv)
                load_chunk(stage + l.values + i * l.value_pitch + 2 * at,
                           filled ? row_of<T>(p.value, p.value_strides, tile.b, tile.kv, j) : nullptr,
                           static_cast<const T*>(p.value), at, static_cast<int>(p.value_dim), aligned.value);
        }
    };

    // A lane has two rows (heads) of its warp's 16, lane / 4 and 8 below.
    float out[kOuts][4], maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kOuts; ++n)
        for (int i = 0; i < 4; ++i) out[n][i] = 0.f;

    auto work = [&](const unsigned char* stage, int chunk) {
        float score[kScores][4];
#pragma unroll
        for (int n = 0; n < kScores; ++n)
            for (int i = 0; i < 4; ++i) score[n][i] = 0.f;
        const unsigned char* query =
            shared + l.query + (head_warp * kRows + matrix % 2 * 8 + row8) * l.key_pitch + matrix / 2 * 16;
        const unsigned char* key =
            stage + l.keys + (chunk + matrix / 2 * 8 + row8) * l.key_pitch + matrix % 2 * 16;
#pragma unroll
        for (int k = 0; k < kDim; k += 16) {
            if (k >= l.D) break;
            uint32_t a[4];
            load_matrices<false>(a, query + 2 * k);
#pragma unroll
            for (int n = 0; n < kScores; n += 2) {
                uint32_t b[4];
                load_matrices<false>(b, key + n * 8 * l.key_pitch + 2 * k);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                mma_16x8x16<kBfloat>(score[n], a, low);
                mma_16x8x16<kBfloat>(score[n + 1], a, high);
            }
        }

        float most[2] = {maximum[0], maximum[1]};
        const int32_t* filled = reinterpret_cast<const int32_t*>(stage + l.ids) + chunk + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kScores; ++n)
            for (int i = 0; i < 4; ++i) {
                score[n][i] = filled[8 * n + i % 2] ? scoring.score(scoring.bend(score[n][i])) : -INFINITY;
                most[i / 2] = fmaxf(most[i / 2], score[n][i]);
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            most[r] = fmaxf(most[r], __shfl_xor_sync(kWarp, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(kWarp, most[r], 2));
        }
        // Maxima rise seldom after the first keys.
        if (__any_sync(kWarp, most[0] > maximum[0] || most[1] > maximum[1])) {
            const float shrink[2] = {exp2_below(maximum[0], most[0]), exp2_below(maximum[1], most[1])};
#pragma unroll
            for (int r = 0; r < 2; ++r) maximum[r] = most[r], total[r] *= shrink[r];
#pragma unroll
            for (int n = 0; n < kOuts; ++n)
                for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
        }
#pragma unroll
        for (int n = 0; n < kScores; ++n)
            for (int i = 0; i < 4; ++i) {
                score[n][i] = exp2_below(score[n][i], maximum[i / 2]);
                total[i / 2] += score[n][i];
            }

        const unsigned char* value =
            stage + l.values + (chunk + matrix % 2 * 8 + row8) * l.value_pitch + matrix / 2 * 16;
#pragma unroll
        for (int k = 0; k < kScores; k += 2) {
            const uint32_t a[4] = {pack<T>(score[k][0], score[k][1]), pack<T>(score[k][2], score[k][3]),
                                   pack<T>(score[k + 1][0], score[k + 1][1]),
                                   pack<T>(score[k + 1][2], score[k + 1][3])};
#pragma unroll
            for (int n = 0; n < kOuts; n += 2) {
                if (n * 8 >= l.Dv) break;
                uint32_t b[4];
                load_matrices<true>(b, value + k * 8 * l.value_pitch + n * 16);
                const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                mma_16x8x16<kBfloat>(out[n], a, low);
                mma_16x8x16<kBfloat>(out[n + 1], a, high);
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
        for (int chunk = part * kChunk; chunk < kTile; chunk += parts * kChunk)
            if (first + chunk < p.slots) work(shared + l.stages + current * l.stage, chunk);
        __syncthreads();
    }
    wait_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(kWarp, total[r], 1);
        total[r] += __shfl_xor_sync(kWarp, total[r], 2);
    }
    if (parts == 2) {  // the stages are free: the second part's warps hand over theirs
        float* mine = reinterpret_cast<float*>(shared + l.stages) + head_warp * (l.Dv / 2 + 4) * 32 + lane;
        if (part == 1) {
#pragma unroll
            for (int n = 0; n < kOuts; ++n) {
                if (n * 8 >= l.Dv) break;
                for (int i = 0; i < 4; ++i) mine[32 * (4 * n + i)] = out[n][i];
            }
            for (int r = 0; r < 2; ++r) {
                mine[32 * (l.Dv / 2 + r)] = maximum[r];
                mine[32 * (l.Dv / 2 + 2 + r)] = total[r];
            }
        }
        __syncthreads();
        if (part == 1) return;
        float own[2], theirs[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float other = mine[32 * (l.Dv / 2 + r)], most = fmaxf(maximum[r], other);
            own[r] = exp2_below(maximum[r], most), theirs[r] = exp2_below(other, most);
            maximum[r] = most;
            total[r] = total[r] * own[r] + mine[32 * (l.Dv / 2 + 2 + r)] * theirs[r];
        }
#pragma unroll
        for (int n = 0; n < kOuts; ++n) {
            if (n * 8 >= l.Dv) break;
            for (int i = 0; i < 4; ++i)
                out[n][i] = out[n][i] * own[i / 2] + mine[32 * (4 * n + i)] * theirs[i / 2];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int h = head_warp * kRows + lane / 4 + 8 * r;
        if (h >= tile.count) continue;
        const int64_t row = (tile.b * p.heads + tile.first + h) * p.query_length + tile.t;
        const float mine =
            p.sink_logits ? add_sink(p.sink_logits[tile.first + h] * kLog2E, maximum[r], total[r]) : 1.f;
        const bool dead = total[r] == 0.f;
        const float inverse = dead ? 0.f : mine / total[r];
        if (lane % 4 == 0) p.lse[row] = dead ? -INFINITY : (maximum[r] + log2f(total[r])) * kLn2;
        T* to = static_cast<T*>(p.out) + row * p.value_dim;
#pragma unroll
        for (int n = 0; n < kOuts; ++n) {
            const int at = 8 * n + lane % 4 * 2;
            const float x = out[n][2 * r] * inverse, y = out[n][2 * r + 1] * inverse;
            if (at + 1 < p.value_dim && p.value_dim % 2 == 0) {
                *reinterpret_cast<uint32_t*>(to + at) = pack<T>(x, y);
            } else {
                if (at < p.value_dim) to[at] = from_float<T>(x);
                if (at + 1 < p.value_dim) to[at + 1] = from_float<T>(y);
            }
        }
    }
}

template <class T, int kDim>
const char* attend_tiles(const AttendParams& p, int32_t device, void* stream) {
    using S = Shape<kDim>;
    const int64_t share = heads_that_share(p);
    const int head_warps = share <= kRows ? 1 : share <= 2 * kRows ? 2 : S::kHeadWarps;
    const int parts = head_warps <= 2 && 2 * head_warps <= S::kHeadWarps ? 2 : 1;
    const Layout l =
        layout_of(static_cast<int>(p.head_dim), static_cast<int>(p.value_dim), head_warps, S::kTile);
    return with_cap(p.softcap, [&](auto capped) {
        return launch(attend_tiles_kernel<T, kDim, capped.value>,
                      static_cast<unsigned>(head_tiles(p, head_warps * kRows)), 32 * head_warps * parts,
                      l.size, device, stream, p, aligned_rows(p), head_warps);
    });
}

}  // namespace

const char* gathered_attention_tiles(const AttendParams& p, int32_t device, void* stream) {
    const bool wide = p.head_dim > 128 || p.value_dim > 128;
    if (p.dtype == DType::kBFloat16)
        return wide ? attend_tiles<BFloat, 256>(p, device, stream)
                    : attend_tiles<BFloat, 128>(p, device, stream);
    return wide ? attend_tiles<Half, 256>(p, device, stream) : attend_tiles<Half, 128>(p, device, stream);
}

}  // namespace sparse_attn::cuda
