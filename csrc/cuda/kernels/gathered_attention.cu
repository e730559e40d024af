// gathered_attention forward, one warp per query and a few heads that share its keys.
//
// A row of D elements lies on as few lanes as hold it, 8 elements each, so that a warp reads several keys at
// once; each such set of lanes has an online softmax of its own, and they are merged at the end. Heads that
// share their keys by the dozen go to the tensor cores instead (gathered_attention_tiles.cu).
#include "gathered_attention.h"

#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kAhead = 4;  // keys that a set of lanes reads at once

template <class T, int kHeads, bool kCapped>
__global__ void __launch_bounds__(32 * kWarps, kHeads == 1 ? 3 : 2)
    attend_kernel(const AttendParams p, const Aligned aligned, const int lanes, const int64_t tiles) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (n >= tiles) return;
    const HeadTile tile = head_tile(p, n, kHeads);
    const int lane = threadIdx.x % 32, at = lane % lanes * kVector, set = lane / lanes, sets = 32 / lanes;
    const int D = static_cast<int>(p.head_dim), Dv = static_cast<int>(p.value_dim);
    const Scoring<kCapped> scoring(p.scale, p.softcap);

    float query[kHeads][kVector], sum[kHeads][kVector], maximum[kHeads], total[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        clear(query[h]);
        clear(sum[h]);
        if (h < tile.count)
            load_vector(query[h], row_of<T>(p.query, p.query_strides, tile.b, tile.first + h, tile.t), at, D,
                        aligned.query);
        maximum[h] = -INFINITY, total[h] = 0.f;
    }

    const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, tile.b, tile.g, tile.t);
    for (int64_t first = 0; first < p.slots; first += 32) {
        const int32_t own = first + lane < p.slots ? indices[first + lane] : -1;
        for (int step = 0; step < lanes; step += kAhead) {  // 32 slots are `lanes` for each set of lanes
            float key[kAhead][kVector], value[kAhead][kVector];
            bool filled[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int32_t j = __shfl_sync(kWarp, own, (step + i) * sets + set);
                filled[i] = step + i < lanes && j >= 0 && j < p.key_length;
                clear(key[i]);
                clear(value[i]);
                if (!filled[i]) continue;
                load_vector(key[i], row_of<T>(p.key, p.key_strides, tile.b, tile.kv, j), at, D, aligned.key);
                load_vector(value[i], row_of<T>(p.value, p.value_strides, tile.b, tile.kv, j), at, Dv,
                            aligned.value);
            }
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                float score[kAhead], most = maximum[h];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    score[i] = scoring.score(scoring.bend(row_dot(query[h], key[i], lanes)));
                    if (!filled[i]) score[i] = -INFINITY;
                    most = fmaxf(most, score[i]);
                }
                const float shrink = exp2_below(maximum[h], most);
                maximum[h] = most;
                total[h] *= shrink;
                scale_by(sum[h], shrink);
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    const float weight = exp2_below(score[i], most);
                    total[h] += weight;
                    add_scaled(sum[h], weight, value[i]);
                }
            }
        }
    }

#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        for (int other = lanes; other < 32; other *= 2) {
            const float theirs = __shfl_xor_sync(kWarp, maximum[h], other);
            const float most = fmaxf(maximum[h], theirs);
            const float mine = exp2_below(maximum[h], most), yours = exp2_below(theirs, most);
            maximum[h] = most;
            total[h] = total[h] * mine + __shfl_xor_sync(kWarp, total[h], other) * yours;
#pragma unroll
            for (int i = 0; i < kVector; ++i)
                sum[h][i] = sum[h][i] * mine + __shfl_xor_sync(kWarp, sum[h][i], other) * yours;
        }
        if (h >= tile.count || set != 0) continue;
        const int64_t row = (tile.b * p.heads + tile.first + h) * p.query_length + tile.t;
        if (p.sink_logits)
            scale_by(sum[h], add_sink(p.sink_logits[tile.first + h] * kLog2E, maximum[h], total[h]));
        const bool dead = total[h] == 0.f;
        scale_by(sum[h], dead ? 0.f : 1.f / total[h]);
        store_vector(static_cast<T*>(p.out) + row * Dv, sum[h], at, Dv);
        if (lane == 0) p.lse[row] = dead ? -INFINITY : (maximum[h] + log2f(total[h])) * kLn2;
    }
}

template <class T, int kHeads>
const char* attend(const AttendParams& p, int32_t device, void* stream) {
    const int64_t tiles = head_tiles(p, kHeads);
    return with_cap(p.softcap, [&](auto capped) {
        return launch(attend_kernel<T, kHeads, capped.value>, static_cast<unsigned>(divide_up(tiles, kWarps)),
                      32 * kWarps, 0, device, stream, p, aligned_rows(p), lanes_per_row(p), tiles);
    });
}

}  // namespace

const char* gathered_attention(const AttendParams& p, int32_t device, void* stream) {
    if (p.batch * p.heads * p.query_length == 0) return nullptr;
    const int64_t share = heads_that_share(p);
    if (p.dtype != DType::kFloat32 && share >= kTileHeads) return gathered_attention_tiles(p, device, stream);
    return with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        return share == 1 ? attend<T, 1>(p, device, stream) : attend<T, 4>(p, device, stream);
    });
}

}  // namespace sparse_attn::cuda
