// gathered_attention backward, the same for every launch: no sum depends on the order in which threads
// arrive.
//
// 1. A pass over the queries: dQ, and each row's softmax (maximum, sum, centre) for the third pass.
// 2. The inverse of `indices`: for each key, the queries that attend to it, ascending (a counting sort).
// 3. A pass over the keys: each gathers its queries, recomputes P and dS, and sums dK and dV.
#include "lib/attention.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kAhead = 2;     // rows that a set of lanes reads at once
constexpr int kKeyWarps = 8;  // warps that divide the queries of one key

// With S the scores, P = softmax(S), dP = dO·V and C = Σ P·dP − dLSE: dS = P·(dP − C), dQ = scale · Σ dS·k.
// The sum is taken as Σ P·dP'·k − C'·Σ P·k with dP' = dP − dO·out, so that one pass suffices and C' is no
// more than the rounding of `out`: nothing cancels. A sink is a key whose value is 0: its dP' is −dO·out.
// With a soft cap whose tanh is t, dS has the factor 1 − t².
template <class T, int kHeads, bool kCapped>
__global__ void __launch_bounds__(32 * kWarps, 2)
    attend_backward_query_kernel(const AttendGradients g, const Aligned aligned, const int lanes,
                                 const int64_t tiles) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (n >= tiles) return;
    const AttendParams& p = g.forward;
    const HeadTile tile = head_tile(p, n, kHeads);
    const int lane = threadIdx.x % 32, at = lane % lanes * kVector, set = lane / lanes, sets = 32 / lanes;
    const int D = static_cast<int>(p.head_dim), Dv = static_cast<int>(p.value_dim);
    const Scoring<kCapped> scoring(p.scale, p.softcap);
    const int64_t first_row = (tile.b * p.heads + tile.first) * p.query_length + tile.t;

    float query[kHeads][kVector], grad[kHeads][kVector];
    float keys[kHeads][kVector], moved[kHeads][kVector];  // Σ P·k, Σ P·dP'·k
    float maximum[kHeads], total[kHeads], shift[kHeads], centre[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        clear(query[h]);
        clear(grad[h]);
        clear(keys[h]);
        clear(moved[h]);
        float out[kVector];
        clear(out);
        if (h < tile.count) {
            const int64_t row = first_row + h * p.query_length;
            load_vector(query[h], row_of<T>(p.query, p.query_strides, tile.b, tile.first + h, tile.t), at, D,
                        aligned.query);
            load_vector(grad[h], static_cast<const T*>(g.grad_out) + row * Dv, at, Dv, aligned.grad_out);
            load_vector(out, static_cast<const T*>(p.out) + row * Dv, at, Dv, aligned.out);
        }
        shift[h] = row_dot(grad[h], out, lanes);
        maximum[h] = -INFINITY, total[h] = 0.f, centre[h] = 0.f;
    }

    const int32_t* indices = row_of<int32_t>(p.indices, p.indices_strides, tile.b, tile.g, tile.t);
    for (int64_t first = 0; first < p.slots; first += 32) {
        const int32_t own = first + lane < p.slots ? indices[first + lane] : -1;
        for (int step = 0; step < lanes; step += kAhead) {
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
                float score[kAhead], bent[kAhead], change[kAhead], most = maximum[h];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    bent[i] = scoring.bend(row_dot(query[h], key[i], lanes));
                    score[i] = scoring.score(bent[i]);
                    change[i] = row_dot(grad[h], value[i], lanes) - shift[h];
                    if (!filled[i]) score[i] = -INFINITY, change[i] = 0.f;
                    most = fmaxf(most, score[i]);
                }
                const float shrink = exp2_below(maximum[h], most);
                maximum[h] = most;
                total[h] *= shrink, centre[h] *= shrink;
                scale_by(keys[h], shrink);
                scale_by(moved[h], shrink);
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    const float weight = exp2_below(score[i], most);
                    total[h] += weight;
                    centre[h] = fmaf(weight, change[i], centre[h]);
                    add_scaled(keys[h], scoring.times_slope(weight, bent[i]), key[i]);
                    add_scaled(moved[h], scoring.times_slope(weight * change[i], bent[i]), key[i]);
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
            centre[h] = centre[h] * mine + __shfl_xor_sync(kWarp, centre[h], other) * yours;
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                keys[h][i] = keys[h][i] * mine + __shfl_xor_sync(kWarp, keys[h][i], other) * yours;
                moved[h][i] = moved[h][i] * mine + __shfl_xor_sync(kWarp, moved[h][i], other) * yours;
            }
        }
        if (h >= tile.count || set != 0) continue;
        const int64_t row = first_row + h * p.query_length;
        if (p.sink_logits) {
            const float sink = p.sink_logits[tile.first + h] * kLog2E;
            const float mine = add_sink(sink, maximum[h], total[h]);
            centre[h] = centre[h] * mine - exp2_below(sink, maximum[h]) * shift[h];
            scale_by(keys[h], mine);
            scale_by(moved[h], mine);
        }
        const bool dead = total[h] == 0.f;
        const float inverse = dead ? 0.f : 1.f / total[h];
        const float rest = centre[h] * inverse - (g.grad_lse && !dead ? g.grad_lse[row] : 0.f);  // C'
        scale_by(moved[h], dead ? 0.f : inverse * p.scale);
        if (!dead) add_scaled(moved[h], -rest * inverse * p.scale, keys[h]);
        store_vector(static_cast<T*>(g.grad_query) + row * D, moved[h], at, D);
        if (lane == 0)
            g.rows[row] =
                RowSoftmax{maximum[h] == -INFINITY ? 0.f : maximum[h], inverse, shift[h] + rest, 0.f};
    }
}

// Key j of key head kv in batch entry b; grid (Tk, Hkv, B). Its sets of lanes take (query, head) pairs in
// turn.
template <class T, bool kCapped>
__global__ void __launch_bounds__(32 * kKeyWarps, 2)
    attend_backward_key_kernel(const AttendGradients g, const Aligned aligned, const int lanes) {
    const AttendParams& p = g.forward;
    const int64_t j = blockIdx.x, kv = blockIdx.y, b = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = lane % lanes * kVector;
    const int set = threadIdx.x / lanes, sets = 32 * kKeyWarps / lanes;
    const int D = static_cast<int>(p.head_dim), Dv = static_cast<int>(p.value_dim);
    const Scoring<kCapped> scoring(p.scale, p.softcap);
    const int64_t per_kv = p.heads / p.kv_heads;
    // With a selection for each query head, the heads of kv have a list each; else one for all of them.
    const int64_t listed = p.groups > p.kv_heads ? 1 : per_kv;

    float key[kVector], value[kVector], grad_key[kVector], grad_value[kVector];
    load_vector(key, row_of<T>(p.key, p.key_strides, b, kv, j), at, D, aligned.key);
    load_vector(value, row_of<T>(p.value, p.value_strides, b, kv, j), at, Dv, aligned.value);
    clear(grad_key);
    clear(grad_value);
    for (int64_t head = kv * per_kv; head < (kv + 1) * per_kv; head += listed) {
        const int64_t list = b * p.groups + head / (p.heads / p.groups);
        const int64_t* starts = g.lists.starts + list * (p.key_length + 1) + j;
        const int32_t* queries = g.lists.queries + list * p.query_length * p.slots + starts[0];
        const int64_t pairs = (starts[1] - starts[0]) * listed;
        for (int64_t first = 0; first < pairs; first += kAhead * sets) {
            float query[kAhead][kVector], grad[kAhead][kVector];
            RowSoftmax softmax[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int64_t pair = first + i * sets + set;
                clear(query[i]);
                clear(grad[i]);
                softmax[i] = RowSoftmax{0.f, 0.f, 0.f, 0.f};
                if (pair >= pairs) continue;
                const int64_t t = queries[pair / listed], h = head + pair % listed;
                const int64_t row = (b * p.heads + h) * p.query_length + t;
                load_vector(query[i], row_of<T>(p.query, p.query_strides, b, h, t), at, D, aligned.query);
                load_vector(grad[i], static_cast<const T*>(g.grad_out) + row * Dv, at, Dv, aligned.grad_out);
                softmax[i] = g.rows[row];
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const float bent = scoring.bend(row_dot(query[i], key, lanes)), score = scoring.score(bent);
                const float change = row_dot(grad[i], value, lanes) - softmax[i].centre;
                // A pair that is not there has an inverse of 0, but the key may hold infinities.
                const bool real = first + i * sets + set < pairs;
                const float weight = real ? exp2f(score - softmax[i].maximum) * softmax[i].inverse : 0.f;
                add_scaled(grad_value, weight, grad[i]);
                add_scaled(grad_key, real ? scoring.times_slope(weight * change * p.scale, bent) : 0.f,
                           query[i]);
            }
        }
    }

    // Each set's sums, then in the order of the sets: [sets, lanes · kVector] twice.
    float* sums = reinterpret_cast<float*>(dynamic_shared());
    for (int other = lanes; other < 32; other *= 2)
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            grad_key[i] += __shfl_xor_sync(kWarp, grad_key[i], other);
            grad_value[i] += __shfl_xor_sync(kWarp, grad_value[i], other);
        }
    const int width = lanes * kVector;
    if (lane < lanes) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            sums[warp * width + at + i] = grad_key[i];
            sums[(kKeyWarps + warp) * width + at + i] = grad_value[i];
        }
    }
    __syncthreads();
    const int64_t row = (b * p.kv_heads + kv) * p.key_length + j;
    for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
        const bool of_key = i < width;
        const int d = of_key ? i : i - width;
        if (d >= (of_key ? D : Dv)) continue;
        float sum = 0.f;
        for (int w = 0; w < kKeyWarps; ++w) sum += sums[((of_key ? 0 : kKeyWarps) + w) * width + d];
        if (of_key) {
            static_cast<T*>(g.grad_key)[row * D + d] = from_float<T>(sum);
        } else {
            static_cast<T*>(g.grad_value)[row * Dv + d] = from_float<T>(sum);
        }
    }
}

template <class T, int kHeads>
const char* query_pass(const AttendGradients& g, int32_t device, void* stream) {
    const AttendParams& p = g.forward;
    const int64_t tiles = head_tiles(p, kHeads);
    return with_cap(p.softcap, [&](auto capped) {
        return launch(attend_backward_query_kernel<T, kHeads, capped.value>,
                      static_cast<unsigned>(divide_up(tiles, kWarps)), 32 * kWarps, 0, device, stream, g,
                      aligned_rows(p, g.grad_out), lanes_per_row(p), tiles);
    });
}

}  // namespace

const char* gathered_attention_backward(const AttendGradients& g, int32_t device, void* stream) {
    const AttendParams& p = g.forward;
    if (p.batch * p.heads == 0) return nullptr;
    if (gradients_on_tiles(p)) return gathered_attention_backward_tiles(g, device, stream);
    return with_type(p.dtype, [&](auto type) -> const char* {
        using T = decltype(type);
        const char* error = nullptr;
        if (p.query_length > 0)
            error = heads_that_share(p) == 1 ? query_pass<T, 1>(g, device, stream)
                                             : query_pass<T, 2>(g, device, stream);
        if (error || p.key_length == 0) return error;
        error = list_keys(p, g.lists, false, device, stream);
        if (error) return error;
        const dim3 keys(static_cast<unsigned>(p.key_length), static_cast<unsigned>(p.kv_heads),
                        static_cast<unsigned>(p.batch));
        const int lanes = lanes_per_row(p);
        return with_cap(p.softcap, [&](auto capped) {
            return launch(attend_backward_key_kernel<T, capped.value>, keys, 32 * kKeyWarps,
                          8 * kKeyWarps * lanes * kVector, device, stream, g, aligned_rows(p, g.grad_out),
                          lanes);
        });
    });
}

}  // namespace sparse_attn::cuda
