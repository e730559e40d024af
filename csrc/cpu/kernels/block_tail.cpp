// Attention to the means of whole blocks of keys, each by the number n of its keys that the query sees but
// has not chosen: weights n · e^s. Forward, and what the backward by tiles (masked_attention_backward.cpp)
// has to know of each query.
#include "block_tail.h"

#include "lib/elementary.h"
#include "lib/stored_scores.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {
namespace {

// The blocks that a query sees whole.
SPARSE_ATTN_INLINE Range whole_blocks(const BlockTailParams& p, int64_t b, int64_t query) {
    const Range keys = key_range(p.select.rule, b, query, p.keys);
    const int64_t begin = (keys.begin + p.block - 1) / p.block;
    return {begin, maximum(begin, keys.end / p.block)};
}

// counts[m] = how many keys of block m are left out, 0 or less where it is not seen whole. `bits`: of all
// keys, 0 before and after.
inline void count_left(const BlockTailParams& p, float* counts, uint32_t* bits, const int32_t* indices,
                       Range blocks) {
    const AttendParams& a = p.attend;
    const int shift = __builtin_ctzll(static_cast<uint64_t>(p.block));
    const int32_t length = static_cast<int32_t>(a.key_length << shift);  // of whole blocks
    memset(counts, 0, static_cast<size_t>(a.key_length) * 4);
    for (int64_t m = blocks.begin; m < blocks.end; ++m) counts[m] = static_cast<float>(p.block);
    int32_t last = -1;
    bool ascending = true;
    for (int64_t n = 0; n < a.slots; ++n) {
        const int32_t key = indices[n];
        if (key < 0 || key >= length) continue;
        ascending &= key > last;
        last = key;
        counts[key >> shift] -= 1.0f;
    }
    if (ascending) return;
    // A key may have been named twice.
    for (int64_t n = 0; n < a.slots; ++n)
        if (indices[n] >= 0 && indices[n] < length) bits[indices[n] / 32] |= 1u << (indices[n] % 32);
    for (int64_t m = blocks.begin; m < blocks.end; ++m) {
        int64_t chosen = 0;
        for (int64_t w = m << shift; w < (m + 1) << shift; w += 32)
            chosen += __builtin_popcount(bits[w / 32]);
        counts[m] = static_cast<float>(p.block - chosen);
    }
    for (int64_t n = 0; n < a.slots; ++n)
        if (indices[n] >= 0 && indices[n] < length) bits[indices[n] / 32] = 0;
}

// The same where the selection is known as bits, of all keys.
SPARSE_ATTN_INLINE void count_left(const BlockTailParams& p, float* counts, const uint32_t* bits,
                                   Range blocks) {
    memset(counts, 0, static_cast<size_t>(p.attend.key_length) * 4);
    const int64_t words = p.block / 32;
    for (int64_t m = blocks.begin; m < blocks.end; ++m) {
        int64_t chosen = 0;
        for (int64_t w = m * words; w < (m + 1) * words; ++w) chosen += __builtin_popcount(bits[w]);
        counts[m] = static_cast<float>(p.block - chosen);
    }
}

SPARSE_ATTN_INLINE const int32_t* index_row(const AttendParams& a, int64_t b, int64_t head, int64_t query) {
    const Strides& s = a.indices_strides;
    return a.indices + b * s.b + head / (a.heads / a.groups) * s.h + query * s.t;
}

SPARSE_ATTN_INLINE void count_left_of(const BlockTailParams& p, float* counts, uint32_t* room, int64_t b,
                                      int64_t head, int64_t query, Range blocks) {
    const AttendParams& a = p.attend;
    if (p.bits)
        count_left(p, counts, p.bits + ((b * a.heads + head) * a.query_length + query) * bit_words(p.keys),
                   blocks);
    else
        count_left(p, counts, room, index_row(a, b, head, query), blocks);
}

// One query of one head.
struct Line {
    float* scores;  // of block m; then n · e^(s − peak)
    float* counts;
    Range blocks;
    float total;
};

struct Work {
    const BlockTailParams& p;
    int64_t width, stride, rows_at_once;
    float *queries, *scores, *counts, *weights, *out;
    uint32_t* bits;
    Line rows[kBlockRows];

    Work(const BlockTailParams& params, int64_t column, void* memory) : p(params) {
        Scratch scratch{static_cast<char*>(memory)};
        const int64_t length = p.select.key_length;
        width = room_for_scores(length);
        stride = round_up(p.attend.value_dim, NR);
        rows_at_once = MR * row_groups(length);
        queries = scratch.take<float>(rows_at_once * column);
        scores = scratch.take<float>(rows_at_once * width);
        counts = scratch.take<float>(rows_at_once * width);
        weights = scratch.take<float>(MR * kChunk);
        out = scratch.take<float>(rows_at_once * stride);
        bits = scratch.take<uint32_t>(room_for_bits(p.keys));
        memset(bits, 0, static_cast<size_t>(room_for_bits(p.keys)) * 4);
        memset(counts, 0, static_cast<size_t>(rows_at_once * width) * 4);
        for (int64_t r = 0; r < rows_at_once; ++r)
            rows[r] = {scores + r * width, counts + r * width, {0, 0}, 0.0f};
    }
    static int64_t bytes(const BlockTailParams& p, int64_t column) {
        const int64_t length = p.select.key_length, rows = MR * row_groups(length),
                      width = room_for_scores(length);
        return 4 * (rows * (column + 2 * width + round_up(p.attend.value_dim, NR)) + MR * kChunk +
                    room_for_bits(p.keys)) +
               1024;
    }

    template <class T, class Tile>
    void score(MaskedTask task, int64_t head, int64_t groups, int64_t end) {
        const SelectParams& s = p.select;
        const int64_t column = column_words<Tile>(s), kv_head = head / (s.heads / s.kv_heads);
        const float* panels = static_cast<const float*>(p.packed_key) +
                              (task.b * s.kv_heads + kv_head) * panel_count(s) * column * NR;
        const T* query =
            static_cast<const T*>(s.query) + task.b * s.query_strides.b + head * s.query_strides.h;
        const int64_t count = task.queries.end - task.queries.begin;
        for (int64_t g = 0; g < groups; ++g) {
            pack<Tile, true>(s, queries + g * MR * column, MR,
                             query + (task.queries.begin + g * MR) * s.query_strides.t,
                             minimum<int64_t>(MR, count - g * MR), s.query_strides.t, s.query_strides.d,
                             sign_of(s.rule.scale));
            for (int64_t n = 0; n * NR < end; ++n)
                score_into<Tile>(scores + g * MR * width + n * NR, width, queries + g * MR * column,
                                 panels + n * column * NR, words<Tile>(s));
        }
    }

    // The weights in place of the scores, their sum; returns the LSE.
    template <bool kCapped>
    float exponentials(Line& row) {
        const float nothing_at_all = -__builtin_inff();
        const Vec nothing = broadcast(nothing_at_all), scale = broadcast(__builtin_fabsf(p.attend.scale)),
                  cap = broadcast(kCapped ? p.attend.softcap : 1.0f);
        Vec top = nothing;
        const int64_t from = row.blocks.begin / W * W;
        bool any = false;
        for (int64_t m = from; m < row.blocks.end; m += W) {
            const uint32_t left = not_le(load(row.counts + m), zero());
            any |= left != 0;
            top = max(where(left, load(row.scores + m), nothing), top);  // skips NaN
        }
        row.total = 0.0f;
        if (!any) return nothing_at_all;
        Vec best = broadcast(max_lane(top)) * scale;
        if (kCapped) best = tanh(best / cap) * cap;
        float peak = max_lane(max(best, nothing));
        if (peak == nothing_at_all) peak = 0.0f;  // −inf − −inf must not become NaN
        Vec total = zero();
        for (int64_t m = from; m < row.blocks.end; m += W) {
            const Vec n = load(row.counts + m);
            Vec s = load(row.scores + m) * scale;
            if (kCapped) s = tanh(s / cap) * cap;
            const Vec e = where(not_le(n, zero()), exp(s - broadcast(peak)) * n, zero());
            store(row.scores + m, e);
            total = total + e;
        }
        row.total = sum(total);
        return row.total == 0.0f ? nothing_at_all : peak + __builtin_logf(row.total);
    }

    // Σ weights · values by tiles of `kChunk` blocks.
    void multiply(int64_t kv, int64_t groups, int64_t end, bool special) {
        const int64_t panel_floats = (p.attend.key_length + kChunk) * NR;
        const float* values = p.packed_value + kv * stride / NR * panel_floats;
        memset(out, 0, static_cast<size_t>(groups * MR * stride) * 4);
        for (int64_t m = 0; m < end; m += kChunk)
            for (int64_t g = 0; g < groups; ++g) {
                for (int r = 0; r < MR; ++r) {
                    const Line& row = rows[g * MR + r];
                    for (int64_t j = 0; j < kChunk; j += W) {
                        const uint32_t lanes = low_bits(clamp<int64_t>(row.blocks.end - m - j, 0, W)) &
                                               ~low_bits(clamp<int64_t>(row.blocks.begin - m - j, 0, W));
                        store(weights + r * kChunk + j,
                              lanes ? where(lanes, load(row.scores + m + j), zero()) : zero());
                    }
                }
                if (special) {
                    add_own(g, m, values, panel_floats);
                    continue;
                }
                for (int64_t d = 0; d < stride; d += NR)
                    gemm_tile<kChunk, 1, true>(out + g * MR * stride + d, stride, weights,
                                               values + d / NR * panel_floats + m * NR, kChunk);
            }
    }

    // The same by what a row has alone: 0 · NaN of another's is no part of it.
    void add_own(int64_t g, int64_t first, const float* values, int64_t panel_floats) {
        for (int r = 0; r < MR; ++r) {
            const Line& row = rows[g * MR + r];
            float* to = out + (g * MR + r) * stride;
            for (int64_t m = maximum(first, row.blocks.begin); m < minimum(first + kChunk, row.blocks.end);
                 ++m) {
                if (row.counts[m] <= 0.0f) continue;
                const Vec weight = broadcast(weights[r * kChunk + m - first]);
                for (int64_t d = 0; d < stride; d += W)
                    store(to + d,
                          fma(weight, load(values + d / NR * panel_floats + m * NR + d % NR), load(to + d)));
            }
        }
    }

    template <class T, class Tile>
    void run(MaskedTask task) {
        const AttendParams& a = p.attend;
        const int64_t per_group = a.heads / a.groups, count = task.queries.end - task.queries.begin,
                      groups = (count + MR - 1) / MR;
        int64_t end = 0;
        for (int64_t r = 0; r < groups * MR; ++r) {
            rows[r].blocks = r < count ? whole_blocks(p, task.b, task.queries.begin + r) : Range{0, 0};
            end = maximum(end, rows[r].blocks.end);
        }
        for (int64_t h = task.heads.begin; h < task.heads.end; ++h) {
            const int64_t kv = task.b * a.kv_heads + h / (a.heads / a.kv_heads);
            if (h == task.heads.begin || h % per_group == 0)
                for (int64_t r = 0; r < count; ++r)
                    count_left_of(p, rows[r].counts, bits, task.b, h, task.queries.begin + r, rows[r].blocks);
            score<T, Tile>(task, h, groups, end);
            const int64_t at = (task.b * a.heads + h) * a.query_length + task.queries.begin;
            for (int64_t r = 0; r < count; ++r)
                a.lse[at + r] = a.softcap > 0 ? exponentials<true>(rows[r]) : exponentials<false>(rows[r]);
            bool special = false;
            // Tiles hold blocks behind the last that is seen.
            for (int64_t m = 0; m < a.key_length; ++m) special |= p.special[kv * a.key_length + m] != 0;
            multiply(kv, groups, end, special);
            for (int64_t r = 0; r < count; ++r) {
                const float total = rows[r].total, inverse = total == 0.0f ? 0.0f : 1.0f / total;
                T* to = static_cast<T*>(a.out) + (at + r) * a.value_dim;
                for (int64_t d = 0; d < a.value_dim; ++d)
                    convert(total == 0.0f ? 0.0f : out[r * stride + d] * inverse, to + d);
            }
        }
    }
};

void run(const BlockTailParams& p, MaskedTask task, void* memory) {
    with_tile(p.select, [&]<class T, class Tile>() {
        Work work(p, column_words<Tile>(p.select), memory);
        work.template run<T, Tile>(task);
    });
}

int64_t scratch_bytes(const BlockTailParams& p) {
    int64_t bytes = 0;
    with_tile(p.select, [&]<class T, class Tile>() { bytes = Work::bytes(p, column_words<Tile>(p.select)); });
    return bytes;
}

int64_t block_queries(const BlockTailParams& p) {
    return MR * row_groups(p.select.key_length);
}

int64_t gradient_scratch_bytes(const BlockTailParams& p) {
    return 4 * (room_for_bits(p.keys) + room_for_scores(p.attend.key_length)) + 256;
}

void prepare(const BlockTailParams& p, const MaskedBackwardParams& g, int64_t b, Range queries,
             void* memory) {
    const AttendParams& a = p.attend;
    Scratch scratch{static_cast<char*>(memory)};
    uint32_t* bits = scratch.take<uint32_t>(room_for_bits(p.keys));
    float* counts = scratch.take<float>(room_for_scores(a.key_length));
    memset(bits, 0, static_cast<size_t>(room_for_bits(p.keys)) * 4);
    for (int64_t i = queries.begin; i < queries.end; ++i) {
        const Range blocks = i < a.query_length ? whole_blocks(p, b, i) : Range{0, 0};
        for (int64_t h = 0; h < a.heads; ++h) {
            int32_t* seen = g.seen + 2 * ((b * a.heads + h) * g.rows + i);
            seen[0] = static_cast<int32_t>(blocks.begin), seen[1] = static_cast<int32_t>(blocks.end);
        }
        for (int64_t n = 0; i < a.query_length && n < a.groups; ++n) {
            count_left_of(p, counts, bits, b, n * (a.heads / a.groups), i, blocks);
            uint16_t* to = g.counts + ((b * a.groups + n) * a.query_length + i) * g.count_stride;
            for (int64_t m = 0; m < g.count_stride; ++m)
                to[m] = m < a.key_length ? static_cast<uint16_t>(bits_of(counts[m]) >> 16) : 0;
        }
    }
}

}  // namespace

SPARSE_ATTN_KERNELS(block_tail, BlockTailKernels) = {
    .block_queries = block_queries,
    .attend = {.scratch_bytes = scratch_bytes, .run = run},
    .gradient_scratch_bytes = gradient_scratch_bytes,
    .prepare = prepare,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
