// Which keys of a row of stored scores a query keeps, as bits: the same selection as select_stream.h has it.
#pragma once

#include "cpu/kernels/masked_attention.h"
#include "stored_scores.h"
#include "threshold.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// One query of one head.
struct Row {
    float* scores;   // of key first + j
    uint32_t* bits;  // of all keys
    float* out;      // [stride]
    float* weights;  // [kChunk]
    int64_t end;     // no key from there on
    float best;      // the largest score, chosen or not; NaN: unknown
    // Unless it is −inf, what is greater is chosen, and bits say so of the keys behind the last whole chunk
    // alone.
    float bound;
    float peak, total_of_sink;
    Vec total;
};

// Bit j: marks(word's first key + j), of keys [from, to).
template <class Marks>
SPARSE_ATTN_INLINE void set_words(uint32_t* bits, int64_t from, int64_t to, const Marks& marks) {
    for (int64_t word = from / 32; word * 32 < to; ++word) {
        const uint32_t inside =
            low_bits(minimum<int64_t>(32, to - word * 32)) & ~low_bits(maximum<int64_t>(0, from - word * 32));
        bits[word] |= marks(word * 32, inside) & inside;
    }
}

// The keys in [from, to) whose score is greater.
SPARSE_ATTN_INLINE void set_above(uint32_t* bits, const float* scores, int64_t first, int64_t from,
                                  int64_t to, float bound) {
    set_words(bits, from, to, [&](int64_t key, uint32_t) {
        uint32_t above = 0;
        for (int j = 0; j < 32; j += W)
            above |= not_le(load(scores + key - first + j), broadcast(bound)) << j;
        return above;
    });
}

// Of the allowed keys in [from, to), `scores` from key `first` on, those that are chosen.
SPARSE_ATTN_INLINE void set_chosen(uint32_t* bits, const float* scores, int64_t first, int64_t from,
                                   int64_t to, const Threshold& t, const Visible& v, int64_t* equal_left) {
    const Vec bound = broadcast(below(t.key));
    const Vec same = broadcast(float_of_order(t.key));
    set_words(bits, from, to, [&](int64_t key, uint32_t inside) {
        const float* s = scores + key - first;
        uint32_t reach = 0, above = 0;
        for (int j = 0; j < 32; j += W) reach |= not_le(load(s + j), bound) << j;
        reach &= inside;
        if (v.mask)
            for (uint32_t left = reach; left; left &= left - 1)
                if (!allowed(v, key + __builtin_ctz(left))) reach &= ~(left & -left);
        if (t.excess == 0 || reach == 0) return reach;
        if (t.key != INT32_MAX)
            for (int j = 0; j < 32; j += W) above |= not_le(load(s + j), same) << j;
        uint32_t equal = reach & ~above;
        while (__builtin_popcount(equal) > *equal_left) equal ^= 0x80000000u >> __builtin_clz(equal);
        *equal_left -= __builtin_popcount(equal);
        return (reach & above) | equal;
    });
}

struct Choosing {
    float *compact, *few;
    int32_t *compact_indices, *few_indices, *keys;
    ThresholdGuess guess;
    bool bits_unread;  // but to weigh
};

// Sets the bits of what the query keeps, as stream_rows has it.
inline void choose_row(const SelectParams& p, const Visible& v, Row& row, int64_t first, Choosing& c) {
    const auto all = [](int64_t, uint32_t) { return ~0u; };
    const auto mask_bits = [&](int64_t key, uint32_t inside) {
        uint32_t open = inside;
        for (uint32_t left = inside; left; left &= left - 1)
            if (!allowed(v, key + __builtin_ctz(left))) open &= ~(left & -left);
        return open;
    };
    const int64_t keep = p.top_k - forced_count(v);
    const auto kept_always = [&](int64_t from, int64_t to) {
        if (v.mask)
            set_words(row.bits, from, to, mask_bits);
        else
            set_words(row.bits, from, to, all);
    };
    kept_always(v.begin, v.sink_end);
    kept_always(v.end, v.limit);
    if (keep <= 0 || v.end <= v.sink_end) return;
    const float* scores = row.scores + (v.sink_end - first);
    int64_t n = v.end - v.sink_end;
    // Of the keys that are no candidates all are kept, and of the candidates the best one.
    const auto best_with = [&](float best) {
        row.best = maximum(best, maximum(largest_of(row.scores + (v.begin - first), v.sink_end - v.begin),
                                         largest_of(row.scores + (v.end - first), v.limit - v.end)));
    };
    if (n <= keep) {
        if (!v.mask) best_with(largest_of(scores, n));
        return kept_always(v.sink_end, v.end);
    }
    if (v.mask) {
        int64_t count = 0;
        for (int64_t j = v.sink_end; j < v.end; ++j)
            if (allowed(v, j)) c.compact[count++] = row.scores[j - first];
        scores = c.compact;
        n = count;
        if (n <= keep) return kept_always(v.sink_end, v.end);
    }
    const Threshold t = find_threshold(scores, n, keep, c.guess, c.few, c.few_indices, c.keys);
    if (!v.mask) best_with(t.best);
    const bool all_above = t.excess == 0 && v.sink_end == v.begin && v.end == v.limit;
    if (c.bits_unread && all_above && !v.mask && below(t.key) > -__builtin_inff()) {
        row.bound = below(t.key);
        const int64_t rest = v.begin + (v.end - v.begin) / kChunk * kChunk;
        return set_above(row.bits, row.scores, first, rest, v.end, row.bound);
    }
    int64_t equal_left = INT32_MAX;
    if (t.excess > 0) {
        const int64_t reach = count_reaching(scores, n, t.key),
                      above = t.key == INT32_MAX ? 0 : count_reaching(scores, n, int64_t{t.key} + 1);
        equal_left = reach - above - t.excess;
    }
    set_chosen(row.bits, row.scores, first, v.sink_end, v.end, t, v, &equal_left);
}

// The chosen keys ascending, then −1.
inline void write_indices(int32_t* to, int64_t slots, const uint32_t* bits, int64_t from, int64_t end,
                          float* room, int32_t* found) {
    int64_t n = 0;
    for (int64_t word = from / 32; word * 32 < end; ++word)
        for (int j = 0; bits[word] && j < 32; j += W) {
            const uint32_t lanes = bits[word] >> j & low_bits(W);
            n += append(room, found + n, lanes, zero(), static_cast<int32_t>(word * 32 + j));
        }
    if (n > 0) memcpy(to, found, static_cast<size_t>(minimum(n, slots)) * 4);
    for (; n < slots; ++n) to[n] = -1;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
