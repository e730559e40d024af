// gathered_attention, backward, in two passes that are the same for any number of threads.
//
// The query pass recomputes P from the scores and the LSE, row by row:
//     P = exp(scale·q·k − LSE)   dP = dO·v   dS = P ∘ (dP − Σ P∘dP + dLSE)   dQ = scale · dS·K
// (with a soft cap P is of capped scores s, and dS has the factor 1 − (s / cap)²), and leaves P and scale·dS
// behind, T·K numbers each. The key pass owns a block of keys, walks all queries in order and adds P·dO to dV
// and scale·dS·q to dK: each key's sum has one order, wherever the blocks and threads begin.
#include "gathered_attention.h"
#include "lib/key_lists.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t backward_query_scratch_bytes(const AttendBackwardParams& p) {
    const AttendParams& f = p.forward;
    return 4 * (2 * round_up(f.head_dim, 16) + round_up(f.value_dim, 16) + 5 * (f.slots + 32)) + 1024;
}

// dQ where the key pass has left scale · dS behind.
template <class T, int D, int Dv>
void query_grads(const AttendBackwardParams& p, int64_t b, Range heads, Range queries, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    float* grad_query = scratch.take<float>(f.head_dim + 16);
    float* grad_scores = scratch.take<float>(f.slots + 16);
    int32_t* keys = scratch.take<int32_t>(f.slots + 16);
    int32_t* slot_of = scratch.take<int32_t>(f.slots + 16);
    const int64_t per_kv_head = f.heads / f.kv_heads, per_group = f.heads / f.groups;
    const Strides &sk = f.key_strides, &si = f.indices_strides;
    for (int64_t i = queries.begin; i < queries.end; ++i) {
        int64_t filled = 0;
        for (int64_t h = heads.begin; h < heads.end; ++h) {
            const int64_t kv = h / per_kv_head, row = (b * f.heads + h) * f.query_length + i;
            const Rows<T, D> key_rows{static_cast<const T*>(f.key) + b * sk.b + kv * sk.h, sk.t, f.head_dim};
            if (h == heads.begin || h % per_group == 0)
                filled = filled_slots(f.indices + b * si.b + h / per_group * si.h + i * si.t, f.slots, 0,
                                      f.key_length, keys, slot_of);
            const float* from = p.grad_score + row * f.slots;
            if (filled != f.slots) {
                for (int64_t n = 0; n < filled; ++n) grad_scores[n] = from[slot_of[n]];
                from = grad_scores;
            }
            key_rows.weighted_sum(from, keys, filled, grad_query);
            store_row(static_cast<T*>(p.grad_query) + row * f.head_dim, grad_query, f.head_dim);
        }
    }
}

template <class T, int D, int Dv>
void query_rows(const AttendBackwardParams& p, int64_t b, Range heads, Range queries, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    float* query = scratch.take<float>(f.head_dim + 16);
    float* grad_query = scratch.take<float>(f.head_dim + 16);
    float* grad_out = scratch.take<float>(f.value_dim + 16);
    float* scores = scratch.take<float>(f.slots + 16);
    float* grad_scores = scratch.take<float>(f.slots + 16);
    float* slopes = scratch.take<float>(f.slots + 16);  // of the soft cap
    int32_t* keys = scratch.take<int32_t>(f.slots + 16);
    int32_t* slot_of = scratch.take<int32_t>(f.slots + 16);
    const int64_t per_kv_head = f.heads / f.kv_heads, per_group = f.heads / f.groups;
    const Strides &sq = f.query_strides, &sk = f.key_strides, &sv = f.value_strides, &si = f.indices_strides;
    const Strides& sg = p.grad_out_strides;

    for (int64_t i = queries.begin; i < queries.end; ++i) {
        int64_t filled = 0;
        for (int64_t h = heads.begin; h < heads.end; ++h) {
            const int64_t kv = h / per_kv_head, row = (b * f.heads + h) * f.query_length + i;
            const Rows<T, D> key_rows{static_cast<const T*>(f.key) + b * sk.b + kv * sk.h, sk.t, f.head_dim};
            const Rows<T, Dv> value_rows{static_cast<const T*>(f.value) + b * sv.b + kv * sv.h, sv.t,
                                         f.value_dim};
            if (h == heads.begin || h % per_group == 0)
                filled = filled_slots(f.indices + b * si.b + h / per_group * si.h + i * si.t, f.slots, 0,
                                      f.key_length, keys, slot_of);
            load_padded(query, static_cast<const T*>(f.query) + b * sq.b + h * sq.h + i * sq.t, f.head_dim,
                        sq.d);
            load_padded(grad_out, static_cast<const T*>(p.grad_out) + b * sg.b + h * sg.h + i * sg.t,
                        f.value_dim, sg.d);
            key_rows.dots(query, keys, filled, f.scale, scores);
            value_rows.dots(grad_out, keys, filled, 1.0f, grad_scores);
            if (f.softcap > 0) {
                soft_cap(scores, filled, 1.0f, f.softcap);
                for (int64_t n = 0; n < filled; n += Vec::W)
                    store(slopes + n, cap_slope(load(scores + n), 1.0f / f.softcap));
            }

            const float lse = f.lse[row];
            const bool dead = lse == -__builtin_inff();
            Vec centre = zero();
            for (int64_t n = 0; n < filled; n += Vec::W) {
                const uint32_t lanes = low_bits(filled - n);
                Vec probability = dead ? zero() : exp(load(scores + n) - broadcast(lse));
                store(scores + n, where(lanes, probability, zero()));
                centre = fma(load(scores + n), where(lanes, load(grad_scores + n), zero()), centre);
            }
            const float shift = sum(centre) - (p.grad_lse ? p.grad_lse[row] : 0.0f);
            for (int64_t n = 0; n < filled; n += Vec::W) {
                Vec d = load(scores + n) * (load(grad_scores + n) - broadcast(shift)) * broadcast(f.scale);
                store(grad_scores + n, dead ? zero() : d);
            }
            if (f.softcap > 0 && !dead)
                for (int64_t n = 0; n < filled; n += Vec::W)
                    store(grad_scores + n, load(grad_scores + n) * load(slopes + n));
            key_rows.weighted_sum(grad_scores, keys, filled, grad_query);
            store_row(static_cast<T*>(p.grad_query) + row * f.head_dim, grad_query, f.head_dim);
            // Back to the slots; the key pass reads filled slots alone.
            float *to_probability = p.probability + row * f.slots, *to_grad = p.grad_score + row * f.slots;
            if (filled == f.slots) {  // every slot in its place already
                memcpy(to_probability, scores, static_cast<size_t>(filled) * 4);
                memcpy(to_grad, grad_scores, static_cast<size_t>(filled) * 4);
                continue;
            }
            for (int64_t n = 0; n < filled; ++n) {
                to_probability[slot_of[n]] = scores[n];
                to_grad[slot_of[n]] = grad_scores[n];
            }
        }
    }
}

void backward_query(const AttendBackwardParams& p, AttendTask task, void* scratch) {
    dispatch(p.forward.dtype, p.forward.head_dim, p.forward.value_dim, [&]<class T, int D, int Dv>() {
        if (p.probability)
            query_rows<T, D, Dv>(p, task.b, task.heads, task.queries, scratch);
        else
            query_grads<T, D, Dv>(p, task.b, task.heads, task.queries, scratch);
    });
}

SPARSE_ATTN_INLINE int64_t padded_width(int64_t n) {
    return round_up(n, Vec::W);
}

int64_t backward_key_scratch_bytes(const AttendBackwardParams& p, int64_t block_keys) {
    const AttendParams& f = p.forward;
    return 4 * (block_keys + tile_queries(f.slots)) * (padded_width(f.head_dim) + padded_width(f.value_dim)) +
           8 * tile_queries(f.slots) + KeyLists::bytes(f.slots, block_keys) + 1024;
}

constexpr int kPairs = 32;  // pairs whose rows stay in the first-level cache between their two uses

// to[d] += Σ weights[i] · rows[pairs[i].query][d], one after the other.
template <int N, int W>
SPARSE_ATTN_INLINE void add_run(float* to, const float* rows, int64_t width, const Pair* pairs,
                                const float* weights, int n) {
    Vec acc[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[v] = load(to + v * Vec::W);
    for (int i = 0; i < n; ++i) {
        const float* row = rows + pairs[i].query * (W > 0 ? W : width);
        const Vec weight = broadcast(weights[i]);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) acc[v] = fma(weight, load(row + v * Vec::W), acc[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(to + v * Vec::W, acc[v]);
}
template <int D>
SPARSE_ATTN_INLINE void add_rows(float* to, const float* rows, int64_t width, const Pair* pairs,
                                 const float* weights, int n) {
    constexpr int kWide = 64 / Vec::W > 8 ? 8 : 64 / Vec::W;
    const int64_t end = D > 0 ? D : width;
    int64_t d = 0;
    for (; d + kWide * Vec::W <= end; d += kWide * Vec::W)
        add_run<kWide, D>(to + d, rows + d, width, pairs, weights, n);
    for (; d < end; d += Vec::W) add_run<1, D>(to + d, rows + d, width, pairs, weights, n);
}

template <class T, int D, int Dv>
struct KeyPass {
    const AttendBackwardParams& p;
    const AttendParams& f;
    const int64_t wide_d, wide_v, block_keys;
    float *queries, *grads;  // rows of the tile
    float *lse, *centre;
    float *grad_key, *grad_value;  // of the block
    KeyLists lists;

    KeyPass(const AttendBackwardParams& params, int64_t block, Scratch& s)
        : p(params),
          f(params.forward),
          wide_d(padded_width(f.head_dim)),
          wide_v(padded_width(f.value_dim)),
          block_keys(block),
          queries(s.take<float>(tile_queries(f.slots) * wide_d)),
          grads(s.take<float>(tile_queries(f.slots) * wide_v)),
          lse(s.take<float>(tile_queries(f.slots))),
          centre(s.take<float>(tile_queries(f.slots))),
          grad_key(s.take<float>(block_keys * wide_d)),
          grad_value(s.take<float>(block_keys * wide_v)),
          lists(f.slots, block_keys, s) {
        memset(grad_key, 0, static_cast<size_t>(block_keys * wide_d) * 4);
        memset(grad_value, 0, static_cast<size_t>(block_keys * wide_v) * 4);
    }

    SPARSE_ATTN_INLINE int64_t width_d() const { return D > 0 ? D : wide_d; }
    SPARSE_ATTN_INLINE int64_t width_v() const { return Dv > 0 ? Dv : wide_v; }

    template <class From>
    static SPARSE_ATTN_INLINE const From* row_of(const void* base, const Strides& s, int64_t b, int64_t h,
                                                 int64_t t) {
        return static_cast<const From*>(base) + b * s.b + h * s.h + t * s.t;
    }

    void load_tile(int64_t b, int64_t h, Range rows) {
        for (int64_t i = rows.begin, to = 0; i < rows.end; ++i, ++to) {
            float* grad = grads + to * wide_v;
            load_padded(queries + to * wide_d, row_of<T>(f.query, f.query_strides, b, h, i), f.head_dim,
                        f.query_strides.d);
            load_padded(grad, row_of<T>(p.grad_out, p.grad_out_strides, b, h, i), f.value_dim,
                        p.grad_out_strides.d);
            if (p.probability) continue;
            const int64_t row = (b * f.heads + h) * f.query_length + i;
            const T* out = row_of<T>(p.out, p.out_strides, b, h, i);
            Vec sum_of = zero();
            for (int64_t d = 0; d < f.value_dim; d += Vec::W) {
                float part[Vec::W] = {};
                load_row(part, out + d * p.out_strides.d, minimum<int64_t>(Vec::W, f.value_dim - d),
                         p.out_strides.d);
                sum_of = fma(load(part), load(grad + d), sum_of);
            }
            lse[to] = f.lse[row];
            centre[to] = sum(sum_of) - (p.grad_lse ? p.grad_lse[row] : 0.0f);
        }
    }

    // P and scale · dS of W pairs.
    SPARSE_ATTN_INLINE void weigh(const Pair* pairs, const Rows<T, D>& key_rows,
                                  const Rows<T, Dv>& value_rows, float* probability, float* grad_score) {
        const Vec nothing = broadcast(-__builtin_inff());
        Vec products[Vec::W], grad_products[Vec::W];
        float lses[Vec::W], centres[Vec::W];
#pragma GCC unroll 16
        for (int j = 0; j < Vec::W; ++j) {
            const Pair pair = pairs[j];
            products[j] = key_rows.dot(queries + pair.query * width_d(), key_rows.row(pair.key));
            lses[j] = lse[pair.query];
            centres[j] = centre[pair.query];
        }
#pragma GCC unroll 16
        for (int j = 0; j < Vec::W; ++j) {
            const Pair pair = pairs[j];
            grad_products[j] = value_rows.dot(grads + pair.query * width_v(), value_rows.row(pair.key));
        }
        Vec score = transpose_sum(products) * broadcast(f.scale);
        if (f.softcap > 0) score = tanh(score / broadcast(f.softcap)) * broadcast(f.softcap);
        const uint32_t alive = not_le(load(lses), nothing);  // a row that attends to nothing has no gradient
        const Vec weight = where(alive, exp(score - load(lses)), zero());
        Vec d = weight * (transpose_sum(grad_products) - load(centres)) * broadcast(f.scale);
        if (f.softcap > 0) d = d * cap_slope(score, 1.0f / f.softcap);
        store(probability, weight);
        store(grad_score, where(alive, d, zero()));
    }

    void add_tile(int64_t b, int64_t h, int64_t count, Range rows, const Rows<T, D>& key_rows,
                  const Rows<T, Dv>& value_rows) {
        load_tile(b, h, rows);
        const int64_t first = ((b * f.heads + h) * f.query_length + rows.begin) * f.slots;
        float probability[kPairs + Vec::W], grad_score[kPairs + Vec::W];
        for (int64_t at = 0; at < count; at += kPairs) {
            const Pair* pairs = lists.pairs + at;
            const int n = static_cast<int>(minimum<int64_t>(kPairs, count - at));
            if (p.probability) {
                for (int i = 0; i < n; ++i) {
                    probability[i] = p.probability[first + pairs[i].place];
                    grad_score[i] = p.grad_score[first + pairs[i].place];
                }
            } else {
                for (int i = 0; i < n; i += Vec::W)
                    weigh(pairs + i, key_rows, value_rows, probability + i, grad_score + i);
                for (int i = 0; i < n; ++i) p.grad_score[first + pairs[i].place] = grad_score[i];
            }
            for (int i = 0, end; i < n; i = end) {
                const uint16_t key = pairs[i].key;
                for (end = i + 1; end < n && pairs[end].key == key;) ++end;
                add_rows<D>(grad_key + key * wide_d, queries, wide_d, pairs + i, grad_score + i, end - i);
                add_rows<Dv>(grad_value + key * wide_v, grads, wide_v, pairs + i, probability + i, end - i);
            }
        }
    }
};

template <class T, int D, int Dv>
void key_rows(const AttendBackwardParams& p, int64_t b, int64_t kv_head, Range block, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    KeyPass<T, D, Dv> pass(p, block.end - block.begin, scratch);
    const int64_t per_kv_head = f.heads / f.kv_heads, per_group = f.heads / f.groups;
    const Strides &sk = f.key_strides, &sv = f.value_strides, &si = f.indices_strides;
    const Rows<T, D> rows{pass.template row_of<T>(f.key, sk, b, kv_head, block.begin), sk.t, f.head_dim};
    const Rows<T, Dv> values{pass.template row_of<T>(f.value, sv, b, kv_head, block.begin), sv.t,
                             f.value_dim};
    const int64_t tile = tile_queries(f.slots);
    for (int64_t i = 0; i < f.query_length; i += tile) {
        const Range queries{i, minimum(f.query_length, i + tile)};
        int64_t count = 0;
        for (int64_t h = kv_head * per_kv_head; h < (kv_head + 1) * per_kv_head; ++h) {
            if (h == kv_head * per_kv_head || h % per_group == 0)
                count = pass.lists.list(f.indices + b * si.b + h / per_group * si.h + i * si.t, si.t,
                                        queries.end - queries.begin, block);
            if (count > 0) pass.add_tile(b, h, count, queries, rows, values);
        }
    }

    const int64_t first = (b * f.kv_heads + kv_head) * f.key_length + block.begin;
    for (int64_t j = 0; j < pass.block_keys; ++j) {
        store_row(static_cast<T*>(p.grad_key) + (first + j) * f.head_dim, pass.grad_key + j * pass.wide_d,
                  f.head_dim);
        store_row(static_cast<T*>(p.grad_value) + (first + j) * f.value_dim,
                  pass.grad_value + j * pass.wide_v, f.value_dim);
    }
}

void backward_key(const AttendBackwardParams& p, int64_t b, int64_t kv_head, Range keys, void* scratch) {
    dispatch(p.forward.dtype, p.forward.head_dim, p.forward.value_dim,
             [&]<class T, int D, int Dv>() { key_rows<T, D, Dv>(p, b, kv_head, keys, scratch); });
}

SPARSE_ATTN_KERNELS(gathered_attention_backward, AttendBackwardKernels) = {
    .query = {.scratch_bytes = backward_query_scratch_bytes, .run = backward_query},
    .key_scratch_bytes = backward_key_scratch_bytes,
    .key = backward_key,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
