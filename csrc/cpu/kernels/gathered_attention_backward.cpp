// gathered_attention, backward, in two passes that are the same for any number of threads.
//
// The query pass recomputes P from the scores and the LSE, row by row:
//     P = exp(scale·q·k − LSE)   dP = dO·v   dS = P ∘ (dP − Σ P∘dP + dLSE)   dQ = scale · dS·K
// (with a soft cap P is of capped scores s, and dS has the factor 1 − (s / cap)²), and leaves P and scale·dS
// behind, T·K numbers each. The key pass owns a block of keys, walks all queries in order and adds P·dO to dV
// and scale·dS·q to dK: each key's sum has one order, wherever the blocks and threads begin.
#include "gathered_attention.h"
#include "lib/rows.h"
#include "lib/scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t backward_query_scratch_bytes(const AttendBackwardParams& p) {
    const AttendParams& f = p.forward;
    return 4 * (2 * round_up(f.head_dim, 16) + round_up(f.value_dim, 16) + 5 * (f.slots + 32)) + 1024;
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
        query_rows<T, D, Dv>(p, task.b, task.heads, task.queries, scratch);
    });
}

SPARSE_ATTN_INLINE int64_t padded_width(int64_t n) {
    return round_up(n, Vec::W);
}

int64_t backward_key_scratch_bytes(const AttendBackwardParams& p, int64_t block_keys) {
    const AttendParams& f = p.forward;
    return 4 * (block_keys + 1) * (padded_width(f.head_dim) + padded_width(f.value_dim)) +
           8 * (f.slots + 32) + 1024;
}

template <class T, int D, int Dv>
void key_rows(const AttendBackwardParams& p, int64_t b, int64_t kv_head, Range block, void* memory) {
    const AttendParams& f = p.forward;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t wide_d = padded_width(f.head_dim), wide_v = padded_width(f.value_dim);
    const int64_t block_keys = block.end - block.begin;
    float* query = scratch.take<float>(wide_d);
    float* grad_out = scratch.take<float>(wide_v);
    float* grad_key = scratch.take<float>(block_keys * wide_d);
    float* grad_value = scratch.take<float>(block_keys * wide_v);
    int32_t* keys = scratch.take<int32_t>(f.slots + 16);
    int32_t* slot_of = scratch.take<int32_t>(f.slots + 16);
    memset(grad_key, 0, static_cast<size_t>(block_keys * wide_d) * 4);
    memset(grad_value, 0, static_cast<size_t>(block_keys * wide_v) * 4);
    const int64_t per_kv_head = f.heads / f.kv_heads, per_group = f.heads / f.groups;
    const Strides &sq = f.query_strides, &si = f.indices_strides, &sg = p.grad_out_strides;

    for (int64_t i = 0; i < f.query_length; ++i) {
        int64_t filled = 0;
        for (int64_t h = kv_head * per_kv_head; h < (kv_head + 1) * per_kv_head; ++h) {
            if (h == kv_head * per_kv_head || h % per_group == 0)
                filled = filled_slots(f.indices + b * si.b + h / per_group * si.h + i * si.t, f.slots,
                                      block.begin, block.end, keys, slot_of);
            if (filled == 0) continue;
            const int64_t row = (b * f.heads + h) * f.query_length + i;
            const float *probability = p.probability + row * f.slots,
                        *grad_score = p.grad_score + row * f.slots;
            load_padded(query, static_cast<const T*>(f.query) + b * sq.b + h * sq.h + i * sq.t, f.head_dim,
                        sq.d);
            load_padded(grad_out, static_cast<const T*>(p.grad_out) + b * sg.b + h * sg.h + i * sg.t,
                        f.value_dim, sg.d);
            for (int64_t n = 0; n < filled; ++n) {
                const int64_t key = keys[n] - block.begin;
                add_scaled<D>(grad_key + key * wide_d, grad_score[slot_of[n]], query, wide_d);
                add_scaled<Dv>(grad_value + key * wide_v, probability[slot_of[n]], grad_out, wide_v);
            }
        }
    }

    const int64_t first = (b * f.kv_heads + kv_head) * f.key_length + block.begin;
    for (int64_t j = 0; j < block_keys; ++j) {
        store_row(static_cast<T*>(p.grad_key) + (first + j) * f.head_dim, grad_key + j * wide_d, f.head_dim);
        store_row(static_cast<T*>(p.grad_value) + (first + j) * f.value_dim, grad_value + j * wide_v,
                  f.value_dim);
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
