// Attention to all visible keys, of which those that are not chosen have one value, their mean: forward, and
// what the backward by tiles (masked_attention_backward.cpp) has to know of each query.
//
// With e_j = e^(s_j − peak), Z their sum over all visible keys and the sink, c the mean of e over the n keys
// that are left out, and Σv the sum of all visible values, which are keys in a row:
//
//     out = (Σ_chosen (e_j − c) v_j + c · Σv) / Z      LSE = peak + log Z
//
// so that the mean costs no read of a value. Where most keys are chosen, differences would cancel: then the
// values that are left out are read. Scores are stored as in masked_attention.cpp.
#include "tail_attention.h"

#include "lib/elementary.h"
#include "lib/rows.h"
#include "lib/stored_scores.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

// One query of one head.
struct Line {
    float* scores;   // of key first + j; then e_j, 0 outside [begin, end)
    uint32_t* bits;  // the chosen, of all keys
    float* out;      // [stride]
    float* weights;  // [kChunk]
    Range keys;
    float share, total;  // c, Z
    bool by_sums;        // of all visible values; else the left out are read, too
};

SPARSE_ATTN_INLINE uint32_t lanes_of(Range keys, int64_t key) {
    return low_bits(clamp<int64_t>(keys.end - key, 0, W)) & ~low_bits(clamp<int64_t>(keys.begin - key, 0, W));
}

inline int64_t chosen_in(const uint32_t* bits, Range keys) {
    int64_t n = 0;
    for (int64_t key = keys.begin / 32 * 32; key < keys.end; key += 32)
        n += __builtin_popcount(bits[key / 32] & low_bits(minimum<int64_t>(32, keys.end - key)) &
                                ~low_bits(clamp<int64_t>(keys.begin - key, 0, 32)));
    return n;
}

// Sets the bits of an index row's keys.
inline void mark(uint32_t* bits, const int32_t* indices, int64_t slots, int64_t key_length) {
    for (int64_t n = 0; n < slots; ++n) {
        const int64_t key = indices[n];
        if (key >= 0 && key < key_length) bits[key / 32] |= 1u << (key % 32);
    }
}

// The visible keys that are chosen, or those that are not; with room for W more.
inline int64_t list_keys(int32_t* to, const uint32_t* bits, Range keys, bool chosen) {
    int64_t n = 0;
    for (int64_t key = keys.begin / W * W; key < keys.end; key += W) {
        const uint32_t marked = bits_at(bits, key);
        n += append_lanes(to + n, (chosen ? marked : ~marked) & lanes_of(keys, key),
                          static_cast<int32_t>(key));
    }
    return n;
}

// Whether what is left out is had from sums of all that is seen.
SPARSE_ATTN_INLINE bool sums_serve(int64_t seen, int64_t left, bool special) {
    return !special && 2 * left >= seen;
}

// e_j in place of the scores, Z, c and LSE; returns the probability of what is left out.
template <bool kCapped>
float exponentials(const TailParams& p, Line& row, int64_t first, float sink, bool special, float* lse) {
    const float nothing_at_all = -__builtin_inff(), size = __builtin_fabsf(p.attend.scale);
    const Vec nothing = broadcast(nothing_at_all), scale = broadcast(size),
              cap = broadcast(kCapped ? p.attend.softcap : 1.0f);
    const Range keys = row.keys;
    Vec top = nothing;
    for (int64_t key = keys.begin / W * W; key < keys.end; key += W) {
        const Vec s = load(row.scores + key - first);
        const bool whole = key >= keys.begin && key + W <= keys.end;
        top = max(whole ? s : where(lanes_of(keys, key), s, nothing), top);  // skips NaN
    }
    float peak = nothing_at_all;
    if (keys.begin < keys.end) {
        Vec best = broadcast(max_lane(top)) * scale;
        if (kCapped) best = tanh(best / cap) * cap;
        peak = max_lane(max(best, nothing));  // −inf · 0 is NaN
    }
    peak = maximum(sink, peak);
    float of_sink = 0.0f;
    if (sink != nothing_at_all) of_sink = max_lane(exp(broadcast(sink - peak)));
    if (peak == nothing_at_all) peak = 0.0f;  // −inf − −inf must not become NaN
    const Vec centre = broadcast(peak);
    Vec kept = zero(), left = zero();
    for (int64_t key = keys.begin / W * W; key < keys.end; key += W) {
        Vec s = load(row.scores + key - first) * scale;
        if (kCapped) s = tanh(s / cap) * cap;
        Vec e = exp(s - centre);
        const bool whole = key >= keys.begin && key + W <= keys.end;
        if (!whole) e = where(lanes_of(keys, key), e, zero());
        store(row.scores + key - first, e);
        const uint32_t bits = bits_at(row.bits, key);
        kept = kept + where(bits, e, zero());
        left = left + where(bits, zero(), e);
    }
    const int64_t seen = keys.end - keys.begin, count = seen - chosen_in(row.bits, keys);
    const float of_left = sum(left);
    row.total = sum(kept) + of_left + of_sink;
    row.share = count > 0 ? of_left / static_cast<float>(count) : 0.0f;
    row.by_sums = sums_serve(seen, count, special);
    *lse = row.total == 0.0f ? nothing_at_all : peak + __builtin_logf(row.total);
    return row.total == 0.0f ? 0.0f : of_left / row.total;
}

// The weights of the values of a chunk of keys.
SPARSE_ATTN_INLINE void weigh(Line& row, int64_t first, int64_t begin) {
    const Vec base = broadcast(row.by_sums ? row.share : 0.0f),
              other = broadcast(row.by_sums ? 0.0f : row.share);
    for (int64_t j = 0; j < kChunk; j += W) {
        const int64_t key = begin + j;
        const uint32_t lanes = lanes_of(row.keys, key), bits = lanes ? bits_at(row.bits, key) : 0u;
        const Vec e = lanes ? load(row.scores + key - first) : zero();
        store(row.weights + j, where(lanes, where(bits, e - base, other), zero()));
    }
}

struct Work {
    const TailParams& p;
    int64_t width, bit_room, stride, rows_at_once;
    float *queries, *scores, *weights, *out;
    uint32_t* bits;
    int32_t* places;
    Line rows[kBlockRows];

    Work(const TailParams& params, int64_t column, void* memory) : p(params) {
        Scratch scratch{static_cast<char*>(memory)};
        const int64_t length = p.select.key_length;
        width = room_for_scores(length);
        bit_room = room_for_bits(length);
        stride = round_up(p.attend.value_dim, NR);
        rows_at_once = MR * row_groups(length);
        queries = scratch.take<float>(rows_at_once * column);
        scores = scratch.take<float>(rows_at_once * width);
        weights = scratch.take<float>(maximum(MR * kChunk, width));
        out = scratch.take<float>(rows_at_once * stride);
        bits = scratch.take<uint32_t>(rows_at_once * bit_room);
        places = scratch.take<int32_t>(width);
        for (int64_t r = 0; r < rows_at_once; ++r)
            rows[r] = {scores + r * width,
                       bits + r * bit_room,
                       out + r * stride,
                       weights + r % MR * kChunk,
                       {0, 0},
                       0.0f,
                       0.0f,
                       true};
    }
    static int64_t bytes(const TailParams& p, int64_t column) {
        const int64_t length = p.select.key_length, rows = MR * row_groups(length),
                      width = room_for_scores(length);
        return 4 * (rows * (column + width + round_up(p.attend.value_dim, NR) + room_for_bits(length)) +
                    maximum(MR * kChunk, width) + width) +
               1024;
    }

    // Scores of the task's queries with the keys of `keys`; returns the key of the first score.
    template <class T, class Tile>
    int64_t score(MaskedTask task, int64_t head, Range keys) {
        const SelectParams& s = p.select;
        const int64_t column = column_words<Tile>(s), kv_head = head / (s.heads / s.kv_heads);
        const float* panels = static_cast<const float*>(p.packed_key) +
                              (task.b * s.kv_heads + kv_head) * panel_count(s) * column * NR;
        const T* query =
            static_cast<const T*>(s.query) + task.b * s.query_strides.b + head * s.query_strides.h;
        const int64_t count = task.queries.end - task.queries.begin, first = keys.begin / 32 * 32;
        const int64_t groups = (count + MR - 1) / MR;
        for (int64_t g = 0; g < groups; ++g)
            pack<Tile, true>(s, queries + g * MR * column, MR,
                             query + (task.queries.begin + g * MR) * s.query_strides.t,
                             minimum<int64_t>(MR, count - g * MR), s.query_strides.t, s.query_strides.d,
                             sign_of(s.rule.scale));
        Range of[kRowGroups];
        for (int64_t g = 0; g < groups; ++g) of[g] = {INT64_MAX, 0};
        for (int64_t r = 0; r < count; ++r) {
            Range& all = of[r / MR];
            all = {minimum(all.begin, rows[r].keys.begin), maximum(all.end, rows[r].keys.end)};
        }
        for (int64_t n = first / NR; n * NR < keys.end; ++n)
            for (int64_t g = 0; g < groups; ++g)
                if (n * NR < of[g].end && (n + 1) * NR > of[g].begin)
                    score_into<Tile>(scores + g * MR * width + n * NR - first, width,
                                     queries + g * MR * column, panels + n * column * NR, words<Tile>(s));
        return first;
    }

    // Σ weights · values by tiles of `kChunk` keys.
    void multiply(int64_t kv, int64_t groups, Range keys, int64_t first) {
        const int64_t panel_floats = (p.attend.key_length + kChunk) * NR;
        const float* values = p.packed_value + kv * stride / NR * panel_floats;
        memset(out, 0, static_cast<size_t>(groups * MR * stride) * 4);
        for (int64_t key = keys.begin / kChunk * kChunk; key < keys.end; key += kChunk)
            for (int64_t g = 0; g < groups; ++g) {
                bool any = false;
                for (int r = 0; r < MR; ++r) {
                    Line& row = rows[g * MR + r];
                    any |= row.keys.begin < key + kChunk && row.keys.end > key;
                    weigh(row, first, key);
                }
                if (!any) continue;
                for (int64_t d = 0; d < stride; d += NR)
                    gemm_tile<kChunk, 1, true>(out + g * MR * stride + d, stride, weights,
                                               values + d / NR * panel_floats + key * NR, kChunk);
            }
    }

    // The same of one row, by the keys that count in it.
    template <class T>
    void gather(const Rows<T, 0>& values, const Rows<T, 64>& of_64, Line& row, int64_t first) {
        const float base = row.by_sums ? row.share : 0.0f;
        int64_t n = list_keys(places, row.bits, row.keys, true);
        for (int64_t i = 0; i < n; ++i) weights[i] = row.scores[places[i] - first] - base;
        if (!row.by_sums) {
            const int64_t left = list_keys(places + n, row.bits, row.keys, false);
            for (int64_t i = n; i < n + left; ++i) weights[i] = row.share;
            n += left;
        }
        if (p.attend.value_dim == 64)
            of_64.weighted_sum(weights, places, n, row.out);
        else
            values.weighted_sum(weights, places, n, row.out);
    }

    template <class T>
    void write(const Line& row, int64_t kv, int64_t at) {
        const AttendParams& a = p.attend;
        T* to = static_cast<T*>(a.out) + at * a.value_dim;
        const double* sums = p.prefix + kv * (a.key_length + 1) * a.value_dim;
        const double *up_to = sums + row.keys.end * a.value_dim,
                     *before = sums + row.keys.begin * a.value_dim;
        const float inverse = row.total == 0.0f ? 0.0f : 1.0f / row.total;
        for (int64_t d = 0; d < a.value_dim; ++d) {
            float x = row.out[d];
            if (row.by_sums) x += row.share * static_cast<float>(up_to[d] - before[d]);
            convert(row.total == 0.0f ? 0.0f : x * inverse, to + d);
        }
    }

    template <class T, class Tile>
    void run(MaskedTask task) {
        const AttendParams& a = p.attend;
        const int64_t per_group = a.heads / a.groups, count = task.queries.end - task.queries.begin,
                      groups = (count + MR - 1) / MR;
        Range keys{INT64_MAX, 0};
        for (int64_t r = 0; r < groups * MR; ++r) {
            rows[r].keys = r < count ? key_range(p.select.rule, task.b, task.queries.begin + r, a.key_length)
                                     : Range{0, 0};
            if (rows[r].keys.begin < rows[r].keys.end)
                keys = {minimum(keys.begin, rows[r].keys.begin), maximum(keys.end, rows[r].keys.end)};
            rows[r].by_sums = true;
            rows[r].share = 0.0f;
        }
        if (keys.end == 0) keys.begin = 0;
        for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
            const int64_t kv_head = h / (a.heads / a.kv_heads), kv = task.b * a.kv_heads + kv_head;
            if (h == task.heads.begin || h % per_group == 0) {
                memset(bits, 0, static_cast<size_t>(rows_at_once * bit_room) * 4);
                const Strides& s = a.indices_strides;
                for (int64_t r = 0; r < count; ++r)
                    mark(rows[r].bits,
                         a.indices + task.b * s.b + h / per_group * s.h + (task.queries.begin + r) * s.t,
                         a.slots, a.key_length);
            }
            const int64_t first = score<T, Tile>(task, h, keys);
            const float sink = sink_of(a.sink_logits, h);
            const bool special = p.special[kv] != 0;
            const int64_t at = (task.b * a.heads + h) * a.query_length + task.queries.begin;
            for (int64_t r = 0; r < count; ++r)
                p.outside[at + r] =
                    a.softcap > 0 ? exponentials<true>(p, rows[r], first, sink, special, a.lse + at + r)
                                  : exponentials<false>(p, rows[r], first, sink, special, a.lse + at + r);
            const Strides& sv = a.value_strides;
            const T* value = static_cast<const T*>(a.value) + task.b * sv.b + kv_head * sv.h;
            if (p.packed_value && !special)
                multiply(kv, groups, keys, first);
            else
                for (int64_t r = 0; r < count; ++r)
                    gather<T>({value, sv.t, a.value_dim}, {value, sv.t, a.value_dim}, rows[r], first);
            for (int64_t r = 0; r < count; ++r) write<T>(rows[r], kv, at + r);
        }
    }
};

void run(const TailParams& p, MaskedTask task, void* memory) {
    with_tile(p.select, [&]<class T, class Tile>() {
        Work work(p, column_words<Tile>(p.select), memory);
        work.template run<T, Tile>(task);
    });
}

int64_t scratch_bytes(const TailParams& p) {
    int64_t bytes = 0;
    with_tile(p.select, [&]<class T, class Tile>() { bytes = Work::bytes(p, column_words<Tile>(p.select)); });
    return bytes;
}

int64_t block_queries(const TailParams& p) {
    return MR * row_groups(p.select.key_length);
}

template <class F>
void with_dtype(DType dtype, const F& f) {
    if (dtype == DType::kFloat32) f(float{});
    if (dtype == DType::kBFloat16) f(bfloat16{});
    if (dtype == DType::kFloat16) f(float16{});
}

void sum_values(const TailParams& p, int64_t b, int64_t kv_head) {
    const AttendParams& a = p.attend;
    const int64_t head = b * a.kv_heads + kv_head, width = a.value_dim;
    double* to = const_cast<double*>(p.prefix) + head * (a.key_length + 1) * width;
    float unusual = 0.0f;  // NaN from an infinity or a NaN, else 0
    for (int64_t d = 0; d < width; ++d) to[d] = 0.0;
    with_dtype(a.dtype, [&](auto type) {
        using T = decltype(type);
        const T* value = static_cast<const T*>(a.value) + b * a.value_strides.b + kv_head * a.value_strides.h;
        for (int64_t j = 0; j < a.key_length; ++j, to += width, value += a.value_strides.t)
            for (int64_t d = 0; d < width; ++d) {
                const float x = to_float(value[d]);
                unusual += x - x;
                to[width + d] = to[d] + static_cast<double>(x);
            }
    });
    const_cast<uint8_t*>(p.special)[head] = unusual != 0.0f || unusual != unusual;
}

// ---- backward

int64_t gradient_scratch_bytes(const TailParams& p) {
    return 4 * (round_up(p.attend.value_dim, 16) + 16 + 2 * room_for_scores(p.select.key_length)) + 512;
}

template <class T>
void prepare_rows(const TailParams& p, const MaskedBackwardParams& g, MaskedTask task, void* memory) {
    const AttendParams& a = p.attend;
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t room = room_for_scores(a.key_length);
    float* mean = scratch.take<float>(a.value_dim + 16);
    float* ones = scratch.take<float>(room);
    int32_t* places = scratch.take<int32_t>(room);
    for (int64_t i = 0; i < room; ++i) ones[i] = 1.0f;
    const int64_t words = bit_words(a.key_length), per_group = a.heads / a.groups;
    for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
        const int64_t kv_head = h / (a.heads / a.kv_heads), kv = task.b * a.kv_heads + kv_head;
        const Strides& sv = a.value_strides;
        const T* value = static_cast<const T*>(a.value) + task.b * sv.b + kv_head * sv.h;
        const Rows<T, 0> values{value, sv.t, a.value_dim};
        const Rows<T, 64> of_64{value, sv.t, a.value_dim};
        const double* sums = p.prefix + kv * (a.key_length + 1) * a.value_dim;
        for (int64_t i = task.queries.begin; i < task.queries.end; ++i) {
            const int64_t to = (task.b * a.heads + h) * g.rows + i;
            g.tail[to] = g.share[to] = 0.0f;
            g.seen[2 * to] = g.seen[2 * to + 1] = 0;
            if (i >= a.query_length) continue;
            const Range keys = key_range(p.select.rule, task.b, i, a.key_length);
            const int64_t at = (task.b * a.heads + h) * a.query_length + i, seen = keys.end - keys.begin;
            g.seen[2 * to] = static_cast<int32_t>(keys.begin);
            g.seen[2 * to + 1] = static_cast<int32_t>(keys.end);
            const uint32_t* bits =
                g.bits + ((task.b * a.groups + h / per_group) * a.query_length + i) * words;
            const int64_t left = seen - chosen_in(bits, keys);
            if (left == 0) continue;
            const bool by_sums = sums_serve(seen, left, p.special[kv] != 0);
            const int64_t n = list_keys(places, bits, keys, by_sums);
            if (a.value_dim == 64)
                of_64.weighted_sum(ones, places, n, mean);
            else
                values.weighted_sum(ones, places, n, mean);
            const double *up_to = sums + keys.end * a.value_dim, *before = sums + keys.begin * a.value_dim;
            const T* grad = static_cast<const T*>(g.grad_out) + task.b * g.grad_out_strides.b +
                            h * g.grad_out_strides.h + i * g.grad_out_strides.t;
            float along = 0.0f;
            for (int64_t d = 0; d < a.value_dim; ++d) {
                const float x = by_sums ? static_cast<float>(up_to[d] - before[d] - mean[d]) : mean[d];
                along += to_float(grad[d * g.grad_out_strides.d]) * x;
            }
            g.tail[to] = along / static_cast<float>(left);
            g.share[to] = p.outside[at] / static_cast<float>(left);
        }
    }
}

void prepare(const TailParams& p, const MaskedBackwardParams& g, MaskedTask task, void* memory) {
    with_dtype(p.attend.dtype, [&](auto type) { prepare_rows<decltype(type)>(p, g, task, memory); });
}

}  // namespace

SPARSE_ATTN_KERNELS(tail_attention, TailKernels) = {
    .sum_values = sum_values,
    .block_queries = block_queries,
    .attend = {.scratch_bytes = scratch_bytes, .run = run},
    .gradient_scratch_bytes = gradient_scratch_bytes,
    .prepare = prepare,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
