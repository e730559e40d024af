// Attention by dense tiles, forward: scores of a few queries with all their keys, of which bits say what
// counts.
//
// The scores are those of topk_select, by the same operations in the same order, and stay in the second-level
// cache while each query's K-th best is found by counting (lib/threshold.h), the bits are set, and the
// exponentials of a chunk of keys are multiplied with its values. A query's sums run over chunks that begin
// at its first key, so they do not depend on where it lies in a row.
#include "masked_attention.h"

#include "lib/chosen_bits.h"
#include "lib/elementary.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

// The largest score that the bits let through, as the softmax has it; skips NaN. −inf where there is none.
template <bool kCapped>
SPARSE_ATTN_INLINE float largest(const Row& row, int64_t first, int64_t begin, float scale, float cap) {
    const Vec nothing = broadcast(-__builtin_inff());
    Vec top = nothing;
    uint32_t any = 0;
    for (int64_t key = begin; key < row.end; key += W) {
        const uint32_t bits = bits_at(row.bits, key);
        any |= bits;
        top = max(where(bits, load(row.scores + key - first), nothing), top);
    }
    if (!any) return max_lane(nothing);
    Vec score = broadcast(max_lane(top)) * broadcast(scale);
    if (kCapped) score = tanh(score / broadcast(cap)) * broadcast(cap);
    return maximum(max_lane(score), max_lane(nothing));  // −inf · 0 is NaN
}

// Weights e^(score − peak) of a chunk's keys, of those above the row's bound.
SPARSE_ATTN_INLINE void weigh_above(Row& row, int64_t first, int64_t begin, float scale) {
    const Vec factor = broadcast(scale), peak = broadcast(row.peak), bound = broadcast(row.bound);
    Vec total = row.total;
#pragma GCC unroll 4
    for (int64_t j = 0; j < kChunk; j += W) {
        const Vec s = load(row.scores + begin - first + j);
        const Vec e = where_above(s, bound, exp(s * factor - peak));
        store(row.weights + j, e);
        total = total + e;
    }
    row.total = total;
}

// The same of those that bits mark; whether there are any.
template <bool kCapped>
SPARSE_ATTN_INLINE bool weigh(Row& row, int64_t first, int64_t begin, float scale, float cap) {
    static_assert(kChunk % 32 == 0);
    if (row.bound != -__builtin_inff() && begin + kChunk <= row.end) {
        weigh_above(row, first, begin, scale);
        return true;
    }
    uint32_t any = 0;
    const Vec factor = broadcast(scale), peak = broadcast(row.peak), nothing = broadcast(-__builtin_inff());
    Vec total = row.total;
    for (int64_t word = 0; word < kChunk; word += 32) {
        const uint32_t marked = word_at(row.bits, begin + word);
        any |= marked;
        const auto each = [&](const auto& chosen) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int j = 0; j < 32; j += W) {
                Vec s = load(row.scores + begin - first + word + j) * factor;
                if (kCapped) s = tanh(s / broadcast(cap)) * broadcast(cap);
                const Vec e = exp(chosen(j, s - peak));
                store(row.weights + word + j, e);
                total = total + e;
            }
        };
        if (marked == ~0u)
            each([](int, Vec x) { return x; });
        else
            each([&](int j, Vec x) { return where(marked >> j & low_bits(W), x, nothing); });
    }
    row.total = total;
    return any != 0;
}

// What gemm_tile would add, by the keys that a row has alone: 0 · NaN of another's is no part of it.
inline void add_own(Row& row, int64_t stride, const float* values, int64_t panel_floats, int64_t begin) {
    for (int64_t d = 0; d < stride; d += NR)
        for (int64_t i = 0; i < NR; i += W) {
            Vec sum_of = zero();
            for (int64_t j = 0; j < kChunk; ++j) {
                if (!(row.bits[(begin + j) / 32] >> ((begin + j) % 32) & 1)) continue;
                const float* value = values + d / NR * panel_floats + (begin + j) * NR + i;
                sum_of = fma(broadcast(row.weights[j]), load(value), sum_of);
            }
            store(row.out + d + i, load(row.out + d + i) + sum_of);
        }
}

// ---- a few queries of one head

struct Work {
    const MaskedParams& p;
    int64_t width, bit_room, stride, rows_at_once;
    float *queries, *scores, *weights, *out, *room;
    uint32_t* bits;
    int32_t* found;
    Choosing choosing;
    Row rows[kBlockRows];

    Work(const MaskedParams& params, int64_t column, void* memory) : p(params) {
        Scratch scratch{static_cast<char*>(memory)};
        const SelectParams& s = p.select;
        width = room_for_scores(s.key_length);
        bit_room = room_for_bits(s.key_length);
        stride = round_up(p.attend.value_dim, NR);
        rows_at_once = MR * row_groups(s.key_length);
        queries = scratch.take<float>(rows_at_once * column);
        scores = scratch.take<float>(rows_at_once * width);
        weights = scratch.take<float>(MR * kChunk);
        out = scratch.take<float>(rows_at_once * stride);
        bits = scratch.take<uint32_t>(rows_at_once * bit_room);
        found = scratch.take<int32_t>(width);
        room = scratch.take<float>(2 * W);
        const int64_t few = kFewScores + 4 * W;
        choosing = {scratch.take<float>(s.rule.mask ? width : 1),
                    scratch.take<float>(few),
                    nullptr,
                    scratch.take<int32_t>(few),
                    scratch.take<int32_t>(few),
                    {},
                    !p.bits && !s.indices && p.attend.softcap == 0 && p.attend.scale != 0};
        for (int64_t r = 0; r < rows_at_once; ++r)
            rows[r] = {scores + r * width,
                       bits + r * bit_room,
                       out + r * stride,
                       weights + r % MR * kChunk,
                       0,
                       0.0f,
                       -__builtin_inff(),
                       0.0f,
                       0.0f,
                       zero()};
    }
    static int64_t bytes(const MaskedParams& p, int64_t column) {
        const SelectParams& s = p.select;
        const int64_t rows = MR * row_groups(s.key_length), width = room_for_scores(s.key_length);
        return 4 * (rows * (column + width + round_up(p.attend.value_dim, NR) + room_for_bits(s.key_length)) +
                    MR * kChunk + (s.rule.mask ? 2 : 1) * width + 3 * (kFewScores + 4 * W) + 2 * W) +
               1024;
    }

    // Scores of queries with the keys of `keys`; returns the key of the first score.
    template <class T, class Tile>
    int64_t score(int64_t b, int64_t head, Range queries_of, Range keys) {
        const SelectParams& s = p.select;
        const int64_t column = column_words<Tile>(s), kv_head = head / (s.heads / s.kv_heads);
        const float* panels = static_cast<const float*>(p.packed_key) +
                              (b * s.kv_heads + kv_head) * panel_count(s) * column * NR;
        const T* query = static_cast<const T*>(s.query) + b * s.query_strides.b + head * s.query_strides.h;
        const int64_t count = queries_of.end - queries_of.begin, first = keys.begin / 32 * 32;
        const int64_t groups = (count + MR - 1) / MR;
        for (int64_t g = 0; g < groups; ++g)
            pack<Tile, true>(s, queries + g * MR * column, MR,
                             query + (queries_of.begin + g * MR) * s.query_strides.t,
                             minimum<int64_t>(MR, count - g * MR), s.query_strides.t, s.query_strides.d,
                             sign_of(s.rule.scale));
        int64_t end_of[kRowGroups] = {};
        for (int64_t r = 0; r < count; ++r) end_of[r / MR] = maximum(end_of[r / MR], rows[r].end);
        for (int64_t n = first / NR; n * NR < keys.end; ++n)
            for (int64_t g = 0; g < groups; ++g)
                if (n * NR < end_of[g])
                    score_into<Tile>(scores + g * MR * width + n * NR - first, width,
                                     queries + g * MR * column, panels + n * column * NR, words<Tile>(s));
        return first;
    }

    template <bool kCapped>
    void attend(int64_t b, int64_t head, Range queries_of, int64_t begin, int64_t first) {
        const AttendParams& a = p.attend;
        const float scale = __builtin_fabsf(a.scale), sink = sink_of(a.sink_logits, head);
        const int64_t count = queries_of.end - queries_of.begin, kv_head = head / (a.heads / a.kv_heads);
        const int64_t groups = (count + MR - 1) / MR, padded = groups * MR;
        const int64_t panel_floats = (a.key_length + kChunk) * NR;
        const float* values = p.packed_value + (b * a.kv_heads + kv_head) * stride / NR * panel_floats;
        const uint8_t* special = p.special + (b * a.kv_heads + kv_head) * a.key_length;
        int64_t end = 0;
        for (int64_t r = 0; r < padded; ++r) {
            Row& row = rows[r];
            row.total = zero();
            row.peak = row.total_of_sink = 0.0f;
            if (r >= count) {
                row.end = 0;
                continue;
            }
            end = maximum(end, row.end);
            const bool known = !kCapped && row.best == row.best && scale > 0.0f;
            const float best =
                known ? row.best * scale : largest<kCapped>(row, first, begin, scale, a.softcap);
            const float peak = row.peak = maximum(sink, best);
            // e^0 or less, or NaN of a logit that is no number.
            if (sink != -__builtin_inff()) row.total_of_sink = max_lane(exp(broadcast(sink - peak)));
            // Where all scores are −inf, −inf − −inf must not become NaN.
            if (peak == -__builtin_inff()) row.peak = 0.0f;
        }
        memset(out, 0, static_cast<size_t>(padded * stride) * 4);
        for (int64_t key = begin; key < end; key += kChunk) {
            bool unusual = false;
            for (int64_t j = key; j < minimum(key + kChunk, a.key_length); ++j) unusual |= special[j] != 0;
            for (int64_t g = 0; g < groups; ++g) {
                bool any = false;
                for (int r = 0; r < MR; ++r) {
                    Row& row = rows[g * MR + r];
                    if (key < row.end)
                        any |= weigh<kCapped>(row, first, key, scale, a.softcap);
                    else
                        memset(row.weights, 0, kChunk * 4);
                }
                if (!any) continue;
                if (unusual) {
                    for (int r = 0; r < MR; ++r)
                        if (Row& row = rows[g * MR + r]; key < row.end) {
                            if (row.bound != -__builtin_inff() && key + kChunk <= row.end)
                                set_above(row.bits, row.scores, first, key, key + kChunk, row.bound);
                            add_own(row, stride, values, panel_floats, key);
                        }
                    continue;
                }
                for (int64_t d = 0; d < stride; d += NR)
                    gemm_tile<kChunk, 1, true>(out + g * MR * stride + d, stride, weights,
                                               values + d / NR * panel_floats + key * NR, kChunk);
            }
        }
    }

    template <class T>
    void write(int64_t b, int64_t head, Range queries_of) {
        const AttendParams& a = p.attend;
        for (int64_t i = queries_of.begin; i < queries_of.end; ++i) {
            const Row& row = rows[i - queries_of.begin];
            const int64_t at = (b * a.heads + head) * a.query_length + i;
            const float total = sum(row.total) + row.total_of_sink,
                        inverse = total == 0.0f ? 0.0f : 1.0f / total;
            T* to = static_cast<T*>(a.out) + at * a.value_dim;
            for (int64_t d = 0; d < a.value_dim; ++d)
                convert(total == 0.0f ? 0.0f : row.out[d] * inverse, to + d);
            a.lse[at] = total == 0.0f ? -__builtin_inff() : row.peak + __builtin_logf(total);
        }
    }

    template <class T, class Tile>
    void score_and_attend(int64_t b, int64_t head, Range queries_of, Range keys, bool choosing_too) {
        const int64_t first = score<T, Tile>(b, head, queries_of, keys);
        if (choosing_too) choose(b, head, queries_of, first);
        if (p.attend.softcap > 0)
            attend<true>(b, head, queries_of, keys.begin, first);
        else
            attend<false>(b, head, queries_of, keys.begin, first);
        write<T>(b, head, queries_of);
    }

    void choose(int64_t b, int64_t head, Range queries_of, int64_t first) {
        const SelectParams& s = p.select;
        const int64_t length = bit_words(s.key_length);
        for (int64_t i = queries_of.begin; i < queries_of.end; ++i) {
            Row& row = rows[i - queries_of.begin];
            const Visible v = visible_to(s, b, head, i);
            choose_row(s, v, row, first, choosing);
            const int64_t at = (b * s.rule.groups + head) * s.query_length + i;
            if (p.bits) memcpy(p.bits + at * length, row.bits, static_cast<size_t>(length) * 4);
            if (s.indices)
                write_indices(s.indices + at * s.top_k, s.top_k, row.bits, v.begin, v.limit, room, found);
        }
    }

    void clear_bits() { memset(bits, 0, static_cast<size_t>(rows_at_once * bit_room) * 4); }
};

template <class F>
SPARSE_ATTN_INLINE void with_work(const MaskedParams& p, void* memory, const F& f) {
    with_tile(p.select, [&]<class T, class Tile>() {
        Work work(p, column_words<Tile>(p.select), memory);
        f.template operator()<T, Tile>(work);
    });
}

void choose(const MaskedParams& p, MaskedTask task, void* memory) {
    with_work(p, memory, [&]<class T, class Tile>(Work& work) {
        const Range queries = task.queries;
        Range keys{0, 0};
        for (int64_t i = queries.begin; i < queries.end; ++i) {
            const Range seen = key_range(p.select.rule, task.b, i, p.select.key_length);
            work.rows[i - queries.begin].end = seen.end;
            work.rows[i - queries.begin].best = __builtin_nanf("");
            work.rows[i - queries.begin].bound = -__builtin_inff();
            keys = {seen.begin, maximum(keys.end, seen.end)};
        }
        work.clear_bits();
        work.template score_and_attend<T, Tile>(task.b, task.heads.begin, queries, keys, true);
    });
}

bool attend(const MaskedParams& p, MaskedTask task, Range keys, void* memory) {
    const AttendParams& a = p.attend;
    const int64_t per_group = a.heads / a.groups, length = a.key_length;
    bool once = true;
    with_work(p, memory, [&]<class T, class Tile>(Work& work) {
        for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
            if (h == task.heads.begin || h % per_group == 0) {
                work.clear_bits();
                for (int64_t i = task.queries.begin; i < task.queries.end; ++i) {
                    const Strides& s = a.indices_strides;
                    const int32_t* indices = a.indices + task.b * s.b + h / per_group * s.h + i * s.t;
                    Row& row = work.rows[i - task.queries.begin];
                    row.end = keys.end;
                    row.best = __builtin_nanf("");
                    row.bound = -__builtin_inff();
                    for (int64_t n = 0; n < a.slots; ++n) {
                        const int64_t key = indices[n];
                        if (key < 0 || key >= length) continue;
                        uint32_t &word = row.bits[key / 32], bit = 1u << (key % 32);
                        once &= !(word & bit);
                        word |= bit;
                    }
                }
                if (!once) return;
            }
            work.template score_and_attend<T, Tile>(task.b, h, task.queries, keys, false);
        }
    });
    return once;
}

int64_t block_queries(const MaskedParams& p) {
    return MR * row_groups(p.select.key_length);
}

int64_t packed_value(const MaskedParams& p) {
    return round_up(p.attend.value_dim, NR) * (p.attend.key_length + kChunk);
}

template <class T>
void pack_values(const MaskedParams& p, int64_t b, int64_t kv_head, Range keys) {
    const AttendParams& a = p.attend;
    const Strides& s = a.value_strides;
    const T* value = static_cast<const T*>(a.value) + b * s.b + kv_head * s.h;
    const int64_t head = b * a.kv_heads + kv_head, panel_floats = (a.key_length + kChunk) * NR;
    float* to = const_cast<float*>(p.packed_value) + head * packed_value(p);
    uint8_t* special = const_cast<uint8_t*>(p.special) + head * a.key_length;
    const int64_t last = keys.end == a.key_length ? keys.end + kChunk : keys.end;
    for (int64_t j = keys.begin; j < last; ++j) {
        Vec unusual = zero();
        for (int64_t d = 0; d < a.value_dim; d += NR) {
            float* row = to + d / NR * panel_floats + j * NR;
            const int64_t n = j < a.key_length ? minimum<int64_t>(NR, a.value_dim - d) : 0;
            load_row(row, value + j * s.t + d, n);
            for (int64_t i = n; i < NR; ++i) row[i] = 0.0f;
            // NaN from an infinity or a NaN, else 0.
            for (int64_t i = 0; i < NR; i += W) unusual = unusual + (load(row + i) - load(row + i));
        }
        if (j < a.key_length) special[j] = is_nan(unusual) != 0;
    }
}

void pack_keys_values(const MaskedParams& p, int64_t b, int64_t kv_head, Range keys) {
    if (p.attend.dtype == DType::kFloat32) pack_values<float>(p, b, kv_head, keys);
    if (p.attend.dtype == DType::kBFloat16) pack_values<bfloat16>(p, b, kv_head, keys);
    if (p.attend.dtype == DType::kFloat16) pack_values<float16>(p, b, kv_head, keys);
}

int64_t scratch_bytes(const MaskedParams& p) {
    int64_t bytes = 0;
    with_tile(p.select, [&]<class T, class Tile>() { bytes = Work::bytes(p, column_words<Tile>(p.select)); });
    return bytes;
}

}  // namespace

SPARSE_ATTN_KERNELS(masked_attention, MaskedKernels) = {
    .block_queries = block_queries,
    .packed_value = packed_value,
    .pack = pack_keys_values,
    .scratch_bytes = scratch_bytes,
    .choose = choose,
    .attend = attend,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
