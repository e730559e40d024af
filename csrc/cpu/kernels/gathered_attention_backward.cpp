// gathered_attention, backward, in two passes that are the same for any number of threads, with
//     P = exp(scale·q·k − LSE)   dP = dO·v   dS = P ∘ (dP − δ), δ = Σ P∘dP − dLSE
//     dV = Pᵀ·dO   dK = scale · dSᵀ·q   dQ = scale · dS·K
// (with a soft cap P is of capped scores s, and dS has the factor 1 − (s / cap)²).
//
// The key pass owns a block of keys and walks the queries tile by tile; within a tile it goes key by key
// (lib/key_lists.h). Each key's sum has one order, that of the queries, wherever the blocks and threads
// begin. The query pass takes its rows one by one.
//
// In float32 δ is dO·out − dLSE, known beforehand: the key pass makes P and dS, from rows that it reads once
// for all its products, and leaves scale·dS behind for the query pass, T·K numbers, which makes dQ of it.
// Where `out` is a half type δ is the sum over the slots, which is more exact: the query pass goes first,
// makes P, dS and dQ, and leaves P and scale·dS to the key pass.
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
            const float shift =
                p.centre ? p.centre[row] : sum(centre) - (p.grad_lse ? p.grad_lse[row] : 0.0f);
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

SPARSE_ATTN_INLINE int64_t tile_of(const AttendParams& f) {
    return tile_queries(f.slots, 4 * (padded_width(f.head_dim) + padded_width(f.value_dim)));
}

// Whether a block's gradients can be summed where they are to stand.
SPARSE_ATTN_INLINE bool in_place(const AttendParams& f) {
    return f.dtype == DType::kFloat32 && f.head_dim % Vec::W == 0 && f.value_dim % Vec::W == 0;
}

int64_t backward_key_scratch_bytes(const AttendBackwardParams& p, int64_t block_keys) {
    const AttendParams& f = p.forward;
    const int64_t queries = tile_of(f), sums = in_place(f) ? 0 : block_keys;
    return 4 * (sums + queries) * (padded_width(f.head_dim) + padded_width(f.value_dim)) + 8 * queries +
           KeyLists::bytes(f.slots, queries, block_keys) + 1024;
}

constexpr int kPairs = 32;  // pairs whose rows stay in the first-level cache between their two uses

template <class T, int D, int Dv>
struct KeyPass {
    const AttendBackwardParams& p;
    const AttendParams& f;
    const int64_t wide_d, wide_v, block_keys, tile;
    float *queries, *grads;  // rows of the tile
    float *lse, *centre;
    float *grad_key, *grad_value;  // of the block
    KeyLists lists;

    KeyPass(const AttendBackwardParams& params, int64_t b, int64_t kv_head, Range block, Scratch& s)
        : p(params),
          f(params.forward),
          wide_d(padded_width(f.head_dim)),
          wide_v(padded_width(f.value_dim)),
          block_keys(block.end - block.begin),
          tile(tile_of(f)),
          queries(s.take<float>(tile * wide_d)),
          grads(s.take<float>(tile * wide_v)),
          lse(s.take<float>(tile)),
          centre(s.take<float>(tile)),
          lists(f.slots, tile, block_keys, s) {
        const int64_t first = (b * f.kv_heads + kv_head) * f.key_length + block.begin;
        const bool there = in_place(f);
        grad_key =
            there ? static_cast<float*>(p.grad_key) + first * wide_d : s.take<float>(block_keys * wide_d);
        grad_value =
            there ? static_cast<float*>(p.grad_value) + first * wide_v : s.take<float>(block_keys * wide_v);
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

    // A row as floats, zeros up to whole vectors.
    template <int Width>
    static SPARSE_ATTN_INLINE void load_floats(float* to, const T* from, int64_t n, int64_t stride) {
        if (Width > 0 && stride == 1) {
#pragma GCC unroll 8
            for (int64_t d = 0; d < Width; d += Vec::W) store(to + d, load(from + d));
        } else {
            load_padded(to, from, n, stride);
        }
    }

    void load_tile(int64_t b, int64_t h, Range rows) {
        for (int64_t i = rows.begin, to = 0; i < rows.end; ++i, ++to) {
            float* grad = grads + to * width_v();
            load_floats<D>(queries + to * width_d(), row_of<T>(f.query, f.query_strides, b, h, i), f.head_dim,
                           f.query_strides.d);
            load_floats<Dv>(grad, row_of<T>(p.grad_out, p.grad_out_strides, b, h, i), f.value_dim,
                            p.grad_out_strides.d);
            if (p.probability) continue;
            const int64_t row = (b * f.heads + h) * f.query_length + i;
            lse[to] = f.lse[row];
            centre[to] = p.centre[row];
        }
    }

    // Some pairs, key by key.
    struct Chunk {
        const uint32_t* places;
        int count;
        int32_t query[kPairs];
        Vec products[kPairs], grad_products[kPairs];  // to be summed over their lanes
        float lse[kPairs], centre[kPairs], probability[kPairs], grad_score[kPairs];
    };

    // Products of pairs [from, to) of a chunk, all of one key.
    SPARSE_ATTN_INLINE void multiply(Chunk& c, int from, int to, const Rows<T, D>& keys,
                                     const Rows<T, Dv>& values, int32_t key) {
        const T *key_row = keys.row(key), *value_row = values.row(key);
        constexpr int kHeld = D > 0 && (D + Dv) / Vec::W <= 8 ? (D + Dv) / Vec::W : 0;
        [[maybe_unused]] Vec held[kHeld + 1];
        if constexpr (kHeld > 0) {
#pragma GCC unroll 8
            for (int v = 0; v < D / Vec::W; ++v) held[v] = load(key_row + v * Vec::W);
#pragma GCC unroll 8
            for (int v = 0; v < Dv / Vec::W; ++v) held[D / Vec::W + v] = load(value_row + v * Vec::W);
        }
        for (int i = from; i < to; ++i) {
            const int64_t query = c.query[i];
            const float *row = queries + query * width_d(), *grad = grads + query * width_v();
            if constexpr (kHeld > 0) {
                Vec a = held[0] * load(row), g = held[D / Vec::W] * load(grad);
#pragma GCC unroll 8
                for (int v = 1; v < D / Vec::W; ++v) a = fma(held[v], load(row + v * Vec::W), a);
#pragma GCC unroll 8
                for (int v = 1; v < Dv / Vec::W; ++v)
                    g = fma(held[D / Vec::W + v], load(grad + v * Vec::W), g);
                c.products[i] = a;
                c.grad_products[i] = g;
            } else {
                c.products[i] = keys.dot(row, key_row);
                c.grad_products[i] = values.dot(grad, value_row);
            }
            c.lse[i] = lse[query];
            c.centre[i] = centre[query];
        }
    }

    // P and scale · dS of all pairs of the chunk.
    SPARSE_ATTN_INLINE void weigh(Chunk& c) const {
        const Vec nothing = broadcast(-__builtin_inff()), scale = broadcast(f.scale);
        for (int i = 0; i < c.count; i += Vec::W) {
            Vec score = transpose_sum(c.products + i) * scale;
            if (f.softcap > 0) score = tanh(score / broadcast(f.softcap)) * broadcast(f.softcap);
            const Vec own = load(c.lse + i);
            const uint32_t alive = not_le(own, nothing);  // a row that attends to nothing has no gradient
            const Vec weight = where(alive, exp(score - own), zero());
            Vec d = weight * (transpose_sum(c.grad_products + i) - load(c.centre + i)) * scale;
            if (f.softcap > 0) d = d * cap_slope(score, 1.0f / f.softcap);
            store(c.probability + i, weight);
            store(c.grad_score + i, where(alive, d, zero()));
        }
    }

    // Adds to N vectors of a key's dK and M of its dV what pairs [from, to) give, one after the other.
    template <int N, int M>
    SPARSE_ATTN_INLINE void add(const Chunk& c, int from, int to, float* key, const float* query_columns,
                                float* value, const float* grad_columns) const {
        Vec keys[N + 1], values[M + 1];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) keys[v] = load(key + v * Vec::W);
#pragma GCC unroll 8
        for (int v = 0; v < M; ++v) values[v] = load(value + v * Vec::W);
        for (int i = from; i < to; ++i) {
            const int64_t query = c.query[i];
            const float *row = query_columns + query * width_d(), *grad = grad_columns + query * width_v();
            if (N > 0) {
                const Vec weight = broadcast(c.grad_score[i]);
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) keys[v] = fma(weight, load(row + v * Vec::W), keys[v]);
            }
            if (M > 0) {
                const Vec weight = broadcast(c.probability[i]);
#pragma GCC unroll 8
                for (int v = 0; v < M; ++v) values[v] = fma(weight, load(grad + v * Vec::W), values[v]);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) store(key + v * Vec::W, keys[v]);
#pragma GCC unroll 8
        for (int v = 0; v < M; ++v) store(value + v * Vec::W, values[v]);
    }
    SPARSE_ATTN_INLINE void add_rows(const Chunk& c, int from, int to, int32_t key) const {
        float *own = grad_key + key * width_d(), *value = grad_value + key * width_v();
        constexpr int kVecs = 64 / Vec::W <= 8 ? 64 / Vec::W : 8, kStep = kVecs * Vec::W;
        if (kVecs <= 4 && D == 64 && Dv == 64)
            return add<kVecs, kVecs>(c, from, to, own, queries, value, grads);
        int64_t d = 0;
        for (; d + kStep <= width_d(); d += kStep)
            add<kVecs, 0>(c, from, to, own + d, queries + d, value, grads);
        for (; d < width_d(); d += Vec::W) add<1, 0>(c, from, to, own + d, queries + d, value, grads);
        for (d = 0; d + kStep <= width_v(); d += kStep)
            add<0, kVecs>(c, from, to, own, queries, value + d, grads + d);
        for (; d < width_v(); d += Vec::W) add<0, 1>(c, from, to, own, queries, value + d, grads + d);
    }

    void add_tile(int64_t b, int64_t h, int64_t count, Range rows, const Rows<T, D>& keys,
                  const Rows<T, Dv>& values) {
        load_tile(b, h, rows);
        const int64_t first = ((b * f.heads + h) * f.query_length + rows.begin) * f.slots;
        Chunk c;
        int32_t key = 0;  // that of the chunk's first pair
        for (int64_t at = 0; at < count; at += kPairs) {
            c.places = lists.places + at;
            c.count = static_cast<int>(minimum<int64_t>(kPairs, count - at));
            for (int i = 0; i < c.count; ++i) c.query[i] = static_cast<int32_t>(lists.query_of(c.places[i]));
            while (lists.ends[key] <= at) ++key;
            const auto each_key = [&](const auto& use) __attribute__((always_inline)) {
                for (int from = 0, to, k = key; from < c.count; from = to, ++k) {
                    to = static_cast<int>(minimum<int64_t>(lists.ends[k] - at, c.count));
                    if (to > from) use(from, to, k);
                }
            };
            if (p.probability) {
                for (int i = 0; i < c.count; ++i) {
                    c.probability[i] = p.probability[first + c.places[i]];
                    c.grad_score[i] = p.grad_score[first + c.places[i]];
                }
            } else {
                for (int i = c.count; i < kPairs; ++i) {
                    c.products[i] = c.grad_products[i] = zero();
                    c.lse[i] = c.centre[i] = 0.0f;
                }
                each_key([&](int from, int to, int32_t k) { multiply(c, from, to, keys, values, k); });
                weigh(c);
                for (int i = 0; i < c.count; ++i) p.grad_score[first + c.places[i]] = c.grad_score[i];
            }
            each_key([&](int from, int to, int32_t k) { add_rows(c, from, to, k); });
        }
    }
};

template <class T, int D, int Dv>
void key_rows(const AttendBackwardParams& p, int64_t b, int64_t kv_head, Range block, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    KeyPass<T, D, Dv> pass(p, b, kv_head, block, scratch);
    const int64_t per_kv_head = f.heads / f.kv_heads, per_group = f.heads / f.groups;
    const Strides &sk = f.key_strides, &sv = f.value_strides, &si = f.indices_strides;
    const Rows<T, D> rows{pass.template row_of<T>(f.key, sk, b, kv_head, block.begin), sk.t, f.head_dim};
    const Rows<T, Dv> values{pass.template row_of<T>(f.value, sv, b, kv_head, block.begin), sv.t,
                             f.value_dim};
    for (int64_t i = 0; i < f.query_length; i += pass.tile) {
        const Range queries{i, minimum(f.query_length, i + pass.tile)};
        int64_t count = 0;
        for (int64_t h = kv_head * per_kv_head; h < (kv_head + 1) * per_kv_head; ++h) {
            if (h == kv_head * per_kv_head || h % per_group == 0)
                count = pass.lists.list(f.indices + b * si.b + h / per_group * si.h + i * si.t, si.t,
                                        queries.end - queries.begin, block);
            if (count > 0) pass.add_tile(b, h, count, queries, rows, values);
        }
    }

    if (in_place(f)) return;
    const int64_t first = (b * f.kv_heads + kv_head) * f.key_length + block.begin;
    for (int64_t j = 0; j < pass.block_keys; ++j) {
        store_row(static_cast<T*>(p.grad_key) + (first + j) * f.head_dim, pass.grad_key + j * pass.wide_d,
                  f.head_dim);
        store_row(static_cast<T*>(p.grad_value) + (first + j) * f.value_dim,
                  pass.grad_value + j * pass.wide_v, f.value_dim);
    }
}

// δ = Σ P∘dP − dLSE, which is dO·out − dLSE.
template <class T>
void centre_rows(const AttendBackwardParams& p, int64_t b, int64_t h, Range rows) {
    const AttendParams& f = p.forward;
    const Strides &so = p.out_strides, &sg = p.grad_out_strides;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* out = static_cast<const T*>(p.out) + b * so.b + h * so.h + i * so.t;
        const T* grad = static_cast<const T*>(p.grad_out) + b * sg.b + h * sg.h + i * sg.t;
        // In the order of dP's sums, whatever the strides: where one key has all the weight, dP − δ is to be
        // 0.
        Vec parts[Vec::W] = {};
        Vec& total = parts[0];
        for (int64_t d = 0; d < f.value_dim; d += Vec::W) {
            float a[Vec::W] = {}, g[Vec::W] = {};
            const int64_t n = minimum<int64_t>(Vec::W, f.value_dim - d);
            load_row(a, out + d * so.d, n, so.d);
            load_row(g, grad + d * sg.d, n, sg.d);
            total = fma(load(a), load(g), total);
        }
        const int64_t row = (b * f.heads + h) * f.query_length + i;
        float sums[Vec::W];
        store(sums, transpose_sum(parts));
        p.centre[row] = sums[0] - (p.grad_lse ? p.grad_lse[row] : 0.0f);
    }
}

void backward_centre(const AttendBackwardParams& p, int64_t b, int64_t h, Range rows) {
    if (p.forward.dtype == DType::kFloat32) centre_rows<float>(p, b, h, rows);
}

void backward_key(const AttendBackwardParams& p, int64_t b, int64_t kv_head, Range keys, void* scratch) {
    dispatch(p.forward.dtype, p.forward.head_dim, p.forward.value_dim,
             [&]<class T, int D, int Dv>() { key_rows<T, D, Dv>(p, b, kv_head, keys, scratch); });
}

SPARSE_ATTN_KERNELS(gathered_attention_backward, AttendBackwardKernels) = {
    .query = {.scratch_bytes = backward_query_scratch_bytes, .run = backward_query},
    .centre = backward_centre,
    .key_scratch_bytes = backward_key_scratch_bytes,
    .key = backward_key,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
