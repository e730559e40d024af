// gathered_attention, forward: one query at a time over the keys that its index row names; a few at a time
// where those are keys in a row.
#include "gathered_attention.h"
#include "lib/scratch.h"
#include "lib/together.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

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

// Some queries of some heads, one after the other.
template <class T, int D, int Dv>
struct Attend {
    const AttendParams& p;
    const AttendTask& task;
    const int64_t wide_d, wide_v, room;  // floats of a vector of one query
    float *query, *scores, *sums, *result;
    int32_t *keys, *slot_of;
    bool far;

    Attend(const AttendParams& params, const AttendTask& which, void* memory)
        : p(params),
          task(which),
          wide_d(round_up(p.head_dim, 16)),
          wide_v(round_up(p.value_dim, 16)),
          room(p.slots + 32) {
        Scratch scratch{static_cast<char*>(memory)};
        query = scratch.take<float>(kTogether * wide_d);
        scores = scratch.take<float>(kTogether * room);
        sums = scratch.take<float>(2 * kTogether * wide_v);
        result = scratch.take<float>(kTogether * wide_v);
        keys = scratch.take<int32_t>(room);
        slot_of = scratch.take<int32_t>(room);
        // The rows of a few queries are in no cache, and those of long heads in the last: they lie too far
        // apart to be foreseen.
        const int64_t head_bytes =
            p.key_length * (p.head_dim + p.value_dim) * static_cast<int64_t>(sizeof(T));
        far = p.query_length <= 16 || task.queries.end - task.queries.begin == 1 || head_bytes > 1 << 19;
    }
    static int64_t bytes(const AttendParams& p) {
        const int64_t wide_d = round_up(p.head_dim, 16), wide_v = round_up(p.value_dim, 16),
                      room = p.slots + 32;
        return 4 * (kTogether * (wide_d + 3 * wide_v + room) + 2 * room) + 1024;
    }

    SPARSE_ATTN_INLINE int64_t row_of(int64_t h, int64_t i) const {
        return (task.b * p.heads + h) * p.query_length + i;
    }
    SPARSE_ATTN_INLINE Rows<T, D> key_rows(int64_t h) const {
        const Strides& s = p.key_strides;
        return {static_cast<const T*>(p.key) + task.b * s.b + h / (p.heads / p.kv_heads) * s.h, s.t,
                p.head_dim};
    }
    SPARSE_ATTN_INLINE Rows<T, Dv> value_rows(int64_t h) const {
        const Strides& s = p.value_strides;
        return {static_cast<const T*>(p.value) + task.b * s.b + h / (p.heads / p.kv_heads) * s.h, s.t,
                p.value_dim};
    }
    SPARSE_ATTN_INLINE void load_query(float* to, int64_t h, int64_t i) const {
        const Strides& s = p.query_strides;
        load_padded(to, static_cast<const T*>(p.query) + task.b * s.b + h * s.h + i * s.t, p.head_dim, s.d);
    }
    // Reads which keys the query's row names; how many.
    SPARSE_ATTN_INLINE int64_t read_keys(int64_t h, int64_t i) const {
        const Strides& s = p.indices_strides;
        const int64_t group = h / (p.heads / p.groups);
        return filled_slots(p.indices + task.b * s.b + group * s.h + i * s.t, p.slots, 0, p.key_length, keys,
                            slot_of);
    }
    SPARSE_ATTN_INLINE void write(int64_t row, const float* sum_of, float peak, float total) const {
        T* out = static_cast<T*>(p.out) + row * p.value_dim;
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t d = 0; d < p.value_dim; ++d)
            convert(total == 0.0f ? 0.0f : sum_of[d] * inverse, out + d);
        p.lse[row] = total == 0.0f ? -__builtin_inff() : peak + __builtin_logf(total);
    }

    // Heads inside: heads that share keys find them in cache.
    void alone(int64_t i) {
        int64_t filled = 0;
        for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
            const Rows<T, D> key_rows = this->key_rows(h);
            const Rows<T, Dv> value_rows = this->value_rows(h);
            if (h == task.heads.begin || h % (p.heads / p.groups) == 0) filled = read_keys(h, i);
            const float* known = task.logits ? task.logits + (i - task.queries.begin) * p.slots : nullptr;
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
                load_query(query, h, i);
                key_rows.dots(query, keys, filled, p.scale, scores);
            }
            if (p.softcap > 0) soft_cap(scores, filled, 1.0f, p.softcap);
            float total = 0.0f;
            const float peak = softmax_terms(scores, filled, sink_of(p.sink_logits, h), &total);
            value_rows.weighted_sum(scores, keys, filled, result);
            write(row_of(h, i), result, peak, total);
        }
    }

    // The keys of queries i, i + 1, … where those of each head are in a row, all from the same one on; as
    // many as these: 0 where they are not. Rows whose slots are all filled may have scores already.
    bool in_a_row(int64_t h, int64_t i, int64_t* counts) const {
        const Strides& s = p.indices_strides;
        const int32_t* row = p.indices + task.b * s.b + h / (p.heads / p.groups) * s.h + i * s.t;
        for (int q = 0; q < kTogether; ++q)
            if (row[q * s.t] != row[0] || row[q * s.t + p.slots - 1] >= 0) return false;
        for (int q = 0; q < kTogether; ++q) {
            counts[q] =
                neighbours(row + q * s.t, static_cast<int32_t>(p.slots), static_cast<int32_t>(p.key_length));
            if (counts[q] == 0) return false;
        }
        return true;
    }
    bool go_together(int64_t i, int64_t* counts) const {
        if (i + kTogether > task.queries.end || p.slots == 0 || p.value_dim % Vec::W != 0) return false;
        const int64_t step = p.heads / p.groups;
        for (int64_t h = task.heads.begin; h < task.heads.end; h = (h / step + 1) * step)
            if (!in_a_row(h, i, counts)) return false;
        return true;
    }

    // `counts` are those of the last head.
    void together(int64_t i, int64_t* counts) {
        const Strides& s = p.indices_strides;
        const int64_t step = p.heads / p.groups;
        const bool several = task.heads.begin / step != (task.heads.end - 1) / step;
        for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
            const Rows<T, Dv> value_rows = this->value_rows(h);
            if (several && (h == task.heads.begin || h % step == 0)) in_a_row(h, i, counts);
            const int32_t first = p.indices[task.b * s.b + h / step * s.h + i * s.t];
            int64_t most = 0;
            for (int q = 0; q < kTogether; ++q) {
                load_query(query + q * wide_d, h, i + q);
                most = maximum(most, counts[q]);
            }
            dots_together(key_rows(h), query, first, most, p.scale, scores, room);
            float peaks[kTogether], totals[kTogether];
            for (int q = 0; q < kTogether; ++q) {
                float* own = scores + q * room;
                if (p.softcap > 0) soft_cap(own, counts[q], 1.0f, p.softcap);
                peaks[q] = softmax_terms(own, counts[q], sink_of(p.sink_logits, h), &totals[q]);
            }
            SumsTogether<T, Dv>{value_rows, sums, scores, room, first}.make(counts, result);
            for (int q = 0; q < kTogether; ++q)
                write(row_of(h, i + q), result + q * p.value_dim, peaks[q], totals[q]);
        }
    }
};

void attend(const AttendParams& p, AttendTask task, void* scratch) {
    dispatch(p.dtype, p.head_dim, p.value_dim, [&]<class T, int D, int Dv>() {
        Attend<T, D, Dv> work(p, task, scratch);
        for (int64_t i = task.queries.begin; i < task.queries.end;) {
            int64_t counts[kTogether];
            const bool few = work.go_together(i, counts);
            if (few)
                work.together(i, counts);
            else
                work.alone(i);
            i += few ? kTogether : 1;
        }
    });
}

int64_t attend_scratch_bytes(const AttendParams& p) {
    return Attend<float, 0, 0>::bytes(p);
}

SPARSE_ATTN_KERNELS(gathered_attention, AttendKernel) = {.scratch_bytes = attend_scratch_bytes,
                                                         .run = attend};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
