// topk_select of heads that share a selection, and in float32: both operands of each tile of scores come
// through shared memory. What becomes of the scores is as in topk_select.cu.
//
// Heads that share rank a key by the sum of its softmax probabilities; their LSE come from a kernel before.
#include "lib/select_tile.cuh"

namespace sparse_attn::cuda {
namespace {

// q·k of 64 queries of head h and 64 keys from `key` on.
template <class T>
__device__ __forceinline__ void score_tile(GatheredGemm<T, false, false>& gemm, const SelectParams& p,
                                           const Work& work, int64_t h, int64_t key, int end,
                                           unsigned char* tiles, bool aligned_query, bool aligned_key) {
    const T* queries = row_of<T>(p.query, p.query_strides, work.b, h, work.first);
    const T* keys = row_of<T>(p.key, p.key_strides, work.b, h / (p.heads / p.kv_heads), key);
    const int64_t left = p.query_length - work.first;
    gemm.run(
        tiles, 0, p.head_dim, queries, keys, aligned_query, aligned_key,
        [&](int64_t i) { return Line<T>{i < left ? queries + i * p.query_strides.t : nullptr, p.head_dim}; },
        [&](int64_t column) {
            const int j = TileShape<T>::key_of_column(static_cast<int>(column));
            return Line<T>{key + j < end ? keys + j * p.key_strides.t : nullptr, p.head_dim};
        });
}

// A row's LSE in base 2 from the largest score and the sum beside it, with the head's sink.
__device__ __forceinline__ float whole_lse(const SelectParams& p, int64_t h, float maximum, float total) {
    const float sink = p.rule.sink_logits ? p.rule.sink_logits[h] * kLog2E : -INFINITY;
    if (sink == sink) add_sink(sink, maximum, total);
    return maximum == INFINITY ? INFINITY : maximum + log2f(total);
}

// LSE of every head and query over its visible keys and the head's sink, NaN left out; where the keys are in
// pieces, what each piece has of it. grid (tiles · splits, Hq, B)
template <class T, bool kCapped>
__global__ void __launch_bounds__(kGemmThreads, 3)
    score_lse_kernel(const SelectCall call, const bool aligned_query, const bool aligned_key) {
    using Shape = TileShape<T>;
    const SelectParams& p = call.select;
    SelectShared& shared = *reinterpret_cast<SelectShared*>(dynamic_shared());
    unsigned char* tiles = dynamic_shared() + sizeof(SelectShared);
    const int64_t h = blockIdx.y;
    const int splits = static_cast<int>(call.plan.splits),
              tile_of_queries = (gridDim.x - 1 - blockIdx.x) / splits;
    const Work work{0, static_cast<int>(blockIdx.z), static_cast<int>(h / (p.heads / p.rule.groups)),
                    static_cast<int>(blockIdx.x % splits), tile_of_queries * kGemmTile};
    const SelectTile tile = select_tile(call, work, shared);
    const Scoring<kCapped> scoring(p.rule.scale, p.rule.softcap);
    float maximum[Shape::kQueries], total[Shape::kQueries];
#pragma unroll
    for (int r = 0; r < Shape::kQueries; ++r) maximum[r] = -INFINITY, total[r] = 0.f;
    for (int key = tile.begin; key < tile.end; key += kGemmTile) {
        GatheredGemm<T, false, false> gemm;
        score_tile<T>(gemm, p, work, h, key, tile.end, tiles, aligned_query, aligned_key);
        const int first = key + Shape::first_key();
#pragma unroll
        for (int r = 0; r < Shape::kQueries; ++r) {
            const uint32_t seen =
                tile.plain(key) ? ~0u : Shape::seen(shared.rules[Shape::query(r)], shared.mask, r, first);
            float score[Shape::kKeys], most = maximum[r];
#pragma unroll
            for (int c = 0; c < Shape::kKeys; ++c) {
                score[c] = scoring.score(scoring.bend(Shape::value(gemm.sum, r, c)));
                if (!(seen >> c & 1) || score[c] != score[c]) score[c] = -INFINITY;
                most = fmaxf(most, score[c]);
            }
            total[r] *= exp2_below(maximum[r], most);
            maximum[r] = most;
#pragma unroll
            for (int c = 0; c < Shape::kKeys; ++c) total[r] += exp2_below(score[c], most);
        }
    }
    const int64_t rows = p.batch * p.heads * p.query_length;
#pragma unroll
    for (int r = 0; r < Shape::kQueries; ++r) {
        for (int other = 1; other < Shape::kLanes; other *= 2) {
            const float theirs = __shfl_xor_sync(kWarp, maximum[r], other), most = fmaxf(maximum[r], theirs);
            const float sum = __shfl_xor_sync(kWarp, total[r], other);
            total[r] = total[r] * exp2_below(maximum[r], most) + sum * exp2_below(theirs, most);
            maximum[r] = most;
        }
        const int64_t t = work.first + Shape::query(r), row = (work.b * p.heads + h) * p.query_length + t;
        if (threadIdx.x % Shape::kLanes != 0 || t >= p.query_length) continue;
        if (splits == 1) {
            call.lse[row] = whole_lse(p, h, maximum[r], total[r]);
        } else {
            reinterpret_cast<float2*>(call.lse_parts)[work.split * rows + row] = float2{maximum[r], total[r]};
        }
    }
}

// A thread for each of `rows` heads and queries.
__global__ void __launch_bounds__(kGemmThreads) merge_lse_kernel(const SelectCall call, const int64_t rows) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kGemmThreads + threadIdx.x;
    if (row >= rows) return;
    float maximum = -INFINITY, total = 0.f;
    for (int64_t split = 0; split < call.plan.splits; ++split) {
        const float2 part = reinterpret_cast<const float2*>(call.lse_parts)[split * rows + row];
        const float most = fmaxf(maximum, part.x);
        total = total * exp2_below(maximum, most) + part.y * exp2_below(part.x, most);
        maximum = most;
    }
    const int64_t h = row / call.select.query_length % call.select.heads;
    call.lse[row] = whole_lse(call.select, h, maximum, total);
}

// Persistent blocks. A head's own selection ranks by q·k times the sign of the scale.
template <class T, bool kCapped>
__global__ void __launch_bounds__(kGemmThreads, 2)
    select_gathered_kernel(const SelectCall call, const bool aligned_query, const bool aligned_key) {
    using Shape = TileShape<T>;
    const SelectParams& p = call.select;
    SelectShared& shared = *reinterpret_cast<SelectShared*>(dynamic_shared());
    unsigned char* tiles = dynamic_shared() + sizeof(SelectShared);
    const int capacity = static_cast<int>(call.plan.capacity);
    Candidate* slots = block_slots(call);
    const int64_t share = p.heads / p.rule.groups;
    const Scoring<kCapped> scoring(p.rule.scale, p.rule.softcap);
    const float sign = p.rule.scale > 0.f ? 1.f : p.rule.scale < 0.f ? -1.f : 0.f;
    for (int64_t n = blockIdx.x; n < works(call); n += gridDim.x) {
        const Work work = work_of(call, n);
        __syncthreads();
        select_tile(call, work, shared);
        const SelectTile& tile = shared.tile;  // there, for registers are few
        Rows<T> rows;
        rows.start(shared);
        for (int key = tile.begin; key < tile.end; key += kGemmTile) {
            float rank[8][4];  // of the one head, or the summed probabilities of those that share
#pragma unroll
            for (int i = 0; i < 32; ++i) rank[i / 4][i % 4] = 0.f;
            for (int64_t h = work.group * share; h < (work.group + 1) * share; ++h) {
                GatheredGemm<T, false, false> gemm;
                score_tile<T>(gemm, p, work, h, key, tile.end, tiles, aligned_query, aligned_key);
                if (share == 1) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) rank[i / 4][i % 4] = gemm.sum[i / 4][i % 4] * sign;
                    continue;
                }
#pragma unroll
                for (int r = 0; r < Shape::kQueries; ++r) {
                    const int64_t t = work.first + Shape::query(r);
                    const float most = t < p.query_length
                                           ? call.lse[(work.b * p.heads + h) * p.query_length + t]
                                           : -INFINITY;
#pragma unroll
                    for (int c = 0; c < Shape::kKeys; ++c) {
                        const float score = scoring.score(scoring.bend(Shape::value(gemm.sum, r, c)));
                        const float probability = exp2f(score - most);
                        Shape::value(rank, r, c) += score != score     ? score
                                                    : most > -INFINITY ? probability
                                                                       : 0.f;
                    }
                }
            }
            rows.add(rank, key, tile.plain(key), slots, capacity, shared);
            rows.cut_rows(slots, capacity - kGemmTile, true, shared);
        }
        write_best(call, work, slots, rows, shared);
    }
}

template <class T>
constexpr int64_t kSelectBytes =
    static_cast<int64_t>(sizeof(SelectShared)) + GatheredGemm<T, false, false>::kShared;

template <class T>
const char* select(const SelectCall& call, int32_t device, void* stream) {
    const SelectParams& p = call.select;
    const bool aligned_query = aligned_rows(p.query, p.query_strides, p.head_dim, p.dtype);
    const bool aligned_key = aligned_rows(p.key, p.key_strides, p.head_dim, p.dtype);
    const bool shared = p.rule.groups < p.heads;
    const int64_t bytes = kSelectBytes<T>;
    // A head's own selection is by the uncapped q·k.
    return with_cap(shared ? p.rule.softcap : 0.f, [&](auto capped) {
        const int64_t rows = p.batch * p.heads * p.query_length;
        const dim3 all(static_cast<unsigned>(divide_up(p.query_length, kGemmTile) * call.plan.splits),
                       static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
        const char* error = nullptr;
        if (shared)
            error = launch(score_lse_kernel<T, capped.value>, all, kGemmThreads, bytes, device, stream, call,
                           aligned_query, aligned_key);
        if (!error && shared && call.plan.splits > 1)
            error = launch(merge_lse_kernel, static_cast<unsigned>(divide_up(rows, kGemmThreads)),
                           kGemmThreads, 0, device, stream, call, rows);
        if (error) return error;
        return launch(select_gathered_kernel<T, capped.value>, static_cast<unsigned>(call.plan.blocks),
                      kGemmThreads, bytes, device, stream, call, aligned_query, aligned_key);
    });
}

}  // namespace

int64_t gathered_blocks(const SelectParams& p, int32_t device) {
    int64_t blocks = 1;
    with_type(p.dtype, [&](auto type) -> const char* {
        using T = decltype(type);
        blocks = blocks_at_once(select_gathered_kernel<T, false>, kGemmThreads, kSelectBytes<T>, device);
        return nullptr;
    });
    return blocks;
}

const char* select_gathered(const SelectCall& call, int32_t device, void* stream) {
    return with_type(call.select.dtype,
                     [&](auto type) { return select<decltype(type)>(call, device, stream); });
}

}  // namespace sparse_attn::cuda
