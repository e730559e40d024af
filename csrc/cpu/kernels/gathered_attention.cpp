// gathered_attention, forward: one query at a time over the keys that its index row names.
#include "gathered_attention.h"
#include "lib/rows.h"
#include "lib/scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

int64_t attend_scratch_bytes(const AttendParams& p) {
    return 4 * (round_up(p.head_dim, 16) + round_up(p.value_dim, 16) + 3 * (p.slots + 32)) + 512;
}

// Probabilities of n scores in place (unnormalised) and their sum with the sink's; returns the largest score,
// −inf for none.
inline float softmax_terms(float* scores, int64_t n, float sink, float* total) {
    const float nothing = -__builtin_inff();
    for (int64_t i = n; i < round_up(n, Vec::W); ++i) scores[i] = nothing;
    Vec top = broadcast(sink);
    for (int64_t i = 0; i < n; i += Vec::W) top = max(load(scores + i), top);  // skips NaN
    const float peak = max_lane(top);
    Vec acc = zero();
    for (int64_t i = 0; i < n; i += Vec::W) {
        Vec s = load(scores + i);
        // With peak −inf every score is −inf or NaN, and −inf − −inf must not become NaN.
        Vec e = peak == nothing ? where(is_nan(s), s, zero()) : exp(s - broadcast(peak));
        store(scores + i, e);
        acc = acc + e;
    }
    *total = sum(acc);
    if (sink != nothing) *total += max_lane(exp(broadcast(sink - peak)));
    return peak;
}

template <class R>
SPARSE_ATTN_INLINE void ask_for_rows(const R& rows, const int32_t* keys, int64_t n) {
    const int64_t bytes = rows.width() * static_cast<int64_t>(sizeof(*rows.base));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(rows.row(keys[i])) + at, 0, 2);
}

template <class T, int D, int Dv>
void attend_rows(const AttendParams& p, const AttendTask& task, void* memory) {
    const auto [b, heads, queries, logits] = task;
    Scratch scratch{static_cast<char*>(memory)};
    float* query = scratch.take<float>(p.head_dim + 16);
    float* result = scratch.take<float>(p.value_dim + 16);
    float* scores = scratch.take<float>(p.slots + 16);
    int32_t* keys = scratch.take<int32_t>(p.slots + 16);
    int32_t* slot_of = scratch.take<int32_t>(p.slots + 16);
    const int64_t per_kv_head = p.heads / p.kv_heads, per_group = p.heads / p.groups;

    // The rows of a few queries are in no cache, and those of long heads in the last: they lie too far apart
    // to be foreseen.
    const int64_t head_bytes = p.key_length * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(T));
    const bool far = p.query_length <= 16 || queries.end - queries.begin == 1 || head_bytes > 1 << 19;

    // Heads inside queries: heads that share keys find them in cache.
    for (int64_t i = queries.begin; i < queries.end; ++i) {
        int64_t filled = 0;
        for (int64_t h = heads.begin; h < heads.end; ++h) {
            const int64_t kv = h / per_kv_head, row = (b * p.heads + h) * p.query_length + i;
            const Strides &sq = p.query_strides, &sk = p.key_strides, &sv = p.value_strides,
                          &si = p.indices_strides;
            const Rows<T, D> key_rows{static_cast<const T*>(p.key) + b * sk.b + kv * sk.h, sk.t, p.head_dim};
            const Rows<T, Dv> value_rows{static_cast<const T*>(p.value) + b * sv.b + kv * sv.h, sv.t,
                                         p.value_dim};
            if (h == heads.begin || h % per_group == 0)
                filled = filled_slots(p.indices + b * si.b + h / per_group * si.h + i * si.t, p.slots, 0,
                                      p.key_length, keys, slot_of);
            const float* known = logits ? logits + (i - queries.begin) * p.slots : nullptr;
            if (known && known[0] == known[0] && filled == p.slots) {
                const Vec scale = broadcast(__builtin_fabsf(p.scale));
                for (int64_t n = 0; n < filled; n += Vec::W)
                    store(scores + n,
                          (n + Vec::W <= filled ? load(known + n) : load_n(known + n, filled - n)) * scale);
            } else {
                if (far) {
                    ask_for_rows(key_rows, keys, filled);
                    ask_for_rows(value_rows, keys, filled);
                }
                load_padded(query, static_cast<const T*>(p.query) + b * sq.b + h * sq.h + i * sq.t,
                            p.head_dim, sq.d);
                key_rows.dots(query, keys, filled, p.scale, scores);
            }
            if (p.softcap > 0) soft_cap(scores, filled, 1.0f, p.softcap);
            float total = 0.0f;
            const float peak = softmax_terms(scores, filled, sink_of(p.sink_logits, h), &total);
            T* out = static_cast<T*>(p.out) + row * p.value_dim;
            value_rows.weighted_sum(scores, keys, filled, result);
            const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
            for (int64_t d = 0; d < p.value_dim; ++d)
                convert(total == 0.0f ? 0.0f : result[d] * inverse, out + d);
            p.lse[row] = total == 0.0f ? -__builtin_inff() : peak + __builtin_logf(total);
        }
    }
}

void attend(const AttendParams& p, AttendTask task, void* scratch) {
    dispatch(p.dtype, p.head_dim, p.value_dim,
             [&]<class T, int D, int Dv>() { attend_rows<T, D, Dv>(p, task, scratch); });
}

SPARSE_ATTN_KERNELS(gathered_attention, AttendKernel) = {.scratch_bytes = attend_scratch_bytes,
                                                         .run = attend};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
