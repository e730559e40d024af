// Exact selection from rounded scores. With rows q, k in float32 and their rounded twins q̂, k̂
//
//   |q·k − q̂·k̂| ≤ ‖q − q̂‖·‖k‖ + ‖q̂‖·‖k − k̂‖ = E                              (Cauchy–Schwarz)
//
// up to the same constant for all keys of a row (keys are shifted, which moves all scores of a query alike).
// Of q̂·k̂ the whole number s of units u below it is kept, 16 bits: the exact score lies in [s·u − E, (s + 1)·u
// + E), or, of bytes, whose sum is rounded once more, in [s·u − u / 2 − E, (s + 3 / 2)·u + E). With w = ⌈2E /
// u⌉
// + 1, of bytes + 2,
//
//   s ≤ t − w, where K keys reach t:                    they all score higher, ties excluded: not chosen
//   s ≥ c + w − 1, where at most K keys reach c:        higher than all others but those: chosen
//
// What is left is ranked by the exact score, computed as the full product computes it: the selection has the
// same bits, in whatever order keys are visited.
#pragma once

#include "bounded_rows.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Where the K-th best of the next rows is to be expected: as far from 0, in norms of the query, as it was for
// the rows before, which have seen about the same keys. A bound that most of them would have passed spares
// the search of the next ones, whose scores are marked as they are made; a wrong guess costs time alone.
struct Expected {
    float mean = 0.0f, spread = 0.0f;
    bool usable = false;
};

constexpr float kSpreads = 2.5f;  // standard deviations below the mean of the rows before

// Closes the scores [begin, end) of a row.
SPARSE_ATTN_INLINE void close(int16_t* scores, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scores[i] = kClosed;
}

// Of the keys that stand from `first` on, which are [begin, end) of a row's candidates, closes those that its
// mask hides.
inline void close_masked(int16_t* scores, const Visible& v, int64_t first, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
        if (!allowed(v, j)) scores[j - first] = kClosed;
}

// Of the last rows, as far as they have a threshold.
inline Expected expected_of(const BoundedRow* rows, const RowFacts& facts, uint32_t scored) {
    float sum = 0.0f, squares = 0.0f;
    int n = 0;
    for (int r = 0; r < MR; ++r) {
        if (!(scored >> r & 1) || rows[r].reached == kClosed) continue;
        const float x = static_cast<float>(rows[r].reached) * facts.scale[r] / facts.norm[r];
        sum += x, squares += x * x, ++n;
    }
    if (n < MR / 2) return {};
    const float mean = sum / static_cast<float>(n);
    const float variance = maximum(squares / static_cast<float>(n) - mean * mean, 0.0f);
    return {mean, __builtin_sqrtf(variance), true};
}

// select_rows by bounds; false where they leave too many candidates of some row.
template <class T, class Tile, class Kind>
bool select_rows_by_bounds(const SelectParams& p, int64_t b, int64_t head, Range queries,
                           const uint32_t* panels_of_head, void* memory, float* logits,
                           Survivors& survivors) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t kv_head = head / (p.heads / p.kv_heads), count = queries.end - queries.begin;
    BoundedRows<T, Tile, Kind> work{
        p, static_cast<const T*>(p.query) + b * p.query_strides.b + head * p.query_strides.h,
        static_cast<const T*>(p.key) + b * p.key_strides.b + kv_head * p.key_strides.h, scratch, survivors};
    BoundedRow rows[kBlockRows];  // of those scored together
    for (int64_t i = 0; i < work.together * MR; ++i) work.start(rows[i]);
    Visible visible[kBlockRows];
    int32_t budgets[kBlockRows];
    RowFacts facts[kRowGroups];
    uint32_t scored_rows[kRowGroups] = {};
    Range needed[kRowGroups], span{INT64_MAX, 0};  // of keys

    for (int g = 0; g < kRowGroups; ++g) {
        needed[g] = {INT64_MAX, 0};
        for (int r = 0; r < MR; ++r) {
            const int64_t i = g * MR + r;
            if (i >= count) break;
            const Visible v = visible[i] = visible_to(p, b, head, queries.begin + i);
            const int32_t keep = budgets[i] = static_cast<int32_t>(p.top_k - forced_count(v));
            if (keep <= 0 || v.end <= v.sink_end || (!v.mask && v.end - v.sink_end <= keep)) continue;
            scored_rows[g] |= 1u << r;
            needed[g] = {minimum(needed[g].begin, v.sink_end), maximum(needed[g].end, v.end)};
        }
        if (needed[g].end == 0) continue;
        span = {minimum(span.begin, needed[g].begin), maximum(span.end, needed[g].end)};
    }

    const auto panel_at = [&](int64_t n) {
        return const_cast<uint32_t*>(panels_of_head) + n * rounded_panel_words<Kind>(p.head_dim);
    };
    float key_norm = 0.0f, key_error = 0.0f, plain_norm = 0.0f;
    int32_t exponent = -100;
    for (int64_t n = span.begin / NR; n * NR < span.end; ++n) {
        const PanelFacts& panel = *facts_of<Kind>(panel_at(n), work.word_count);
        key_norm = maximum(key_norm, panel.norm);
        key_error = maximum(key_error, panel.error);
        plain_norm = maximum(plain_norm, panel.plain_norm);
        exponent = maximum(exponent, panel.exponent);
    }
    if (!(key_norm <= 4 * kLargest)) return false;
    const int32_t least = least_shift<Kind>(p.head_dim);
    for (int g = 0; g < kRowGroups; ++g) {
        if (needed[g].end == 0) continue;
        if (!work.prepare(g, queries.begin + g * MR, minimum<int64_t>(MR, count - g * MR), scored_rows[g],
                          key_norm, facts[g]))
            return false;
        work.set_width(facts[g], key_norm, key_error, plain_norm, power_of_two(exponent + least));
    }

    const auto whole = [](float x) { return static_cast<int32_t>(clamp(x, -32000.0f, 32000.0f)); };
    Expected expected;
    int32_t guess = 0;
    const int groups = static_cast<int>((count + MR - 1) / MR);
    for (int g = 0, next; g < groups; g = next) {
        next = static_cast<int>(g == 0 ? 1 : minimum<int64_t>(g + work.together, groups));
        const int rows_here = static_cast<int>(minimum<int64_t>((next - g) * MR, count - g * MR));
        const Visible* seen = visible + g * MR;
        const auto is_scored = [&](int i) { return (scored_rows[g + i / MR] >> (i % MR) & 1) != 0; };
        const auto width_of = [&](int i) { return facts[g + i / MR].width[i % MR]; };
        Range keys{INT64_MAX, 0};  // that the rows need
        for (int j = g; j < next; ++j)
            keys = {minimum(keys.begin, needed[j].begin), maximum(keys.end, needed[j].end)};
        for (int i = 0; i < rows_here; ++i) {
            BoundedRow& row = rows[i];
            row.count = 0;
            row.keep = budgets[g * MR + i];
            row.reached = kClosed;
            row.cut.count = 0;
        }
        int failed = 0;
        for (int64_t first = keys.begin / 64 * 64, last; first < keys.end; first = last) {
            last = minimum(first + work.chunk, keys.end);
            for (int i = 0; i < (next - g) * MR; ++i) {
                BoundedRow& row = rows[i];
                row.bound = 32767;
                row.guess = guess;
                if (is_scored(i) && !seen[i].mask) {
                    if (row.reached > kClosed) {
                        row.bound = row.guess = row.reached;
                    } else if (expected.usable) {
                        const RowFacts& f = facts[g + i / MR];
                        const float norms = f.norm[i % MR] / f.scale[i % MR];
                        row.guess = whole(expected.mean * norms);
                        row.bound = whole((expected.mean - kSpreads * expected.spread) * norms);
                    }
                    if (row.bound < 32767) row.bound = maximum<int32_t>(row.bound - width_of(i), kClosed);
                }
                for (int j = 0; j < NR; ++j) work.bounds[i * NR + j] = static_cast<int16_t>(row.bound);
            }
            score_panels<Kind>(work.scores, work.queries + g * work.word_count * MR, next - g,
                               const_cast<uint32_t*>(panels_of_head), {first / NR, (last + NR - 1) / NR},
                               p.head_dim, least + exponent);
            for (int i = 0; i < rows_here; ++i) {
                const Visible& v = seen[i];
                const int64_t begin = maximum(v.sink_end, first), end = minimum(v.end, last);
                if (!is_scored(i) || begin >= end) continue;
                BoundedRow& row = rows[i];
                int16_t* scores = work.scores.scores + i * work.scores.stride;
                const bool only = v.sink_end >= first && v.end <= last;
                if (!work.take_marked(row, scores, work.scores.marks + i * work.scores.mark_stride,
                                      begin - first, end - first, static_cast<int32_t>(first), width_of(i))) {
                    ++failed;
                    const int64_t from = (begin - first) / 64 * 64, to = round_up(end - first, 64);
                    close(scores, from, begin - first);
                    close(scores, end - first, to);
                    if (v.mask) close_masked(scores, v, first, begin, end);
                    if (!work.take(row, scores + from, to - from, static_cast<int32_t>(first + from),
                                   width_of(i), only))
                        return false;
                }
                if (!only) {
                    row.cut.count = 0;
                    if (!work.trim(row, width_of(i))) return false;
                }
                guess = row.reached;
            }
        }

        int32_t* out =
            p.indices + ((b * p.rule.groups + head) * p.query_length + queries.begin + g * MR) * p.top_k;
        for (int i = 0; i < rows_here; ++i, out += p.top_k) {
            BoundedRow& row = rows[i];
            const Visible& v = seen[i];
            const int32_t* best = row.places;
            float* to = logits ? logits + (g * MR + i) * p.top_k : nullptr;
            if (to) *to = __builtin_nanf("");  // none
            if (row.keep != p.top_k) to = nullptr;
            if (is_scored(i)) {
                best = work.finish(row, width_of(i), facts[g + i / MR].slack[i % MR],
                                   queries.begin + g * MR + i, to);
            } else if (row.keep > 0) {
                for (int64_t j = v.sink_end; j < v.end; ++j)
                    row.places[row.count++] = static_cast<int32_t>(j);
            }
            emit(out, p.top_k, v, best, row.count);
        }
        // Where guesses fail they cost more than they spare.
        const bool tried = expected.usable;
        expected = expected_of(rows + (next - 1 - g) * MR, facts[next - 1], scored_rows[next - 1]);
        if (tried && 2 * failed > (next - g) * MR) expected.usable = false;
    }
    return true;
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
