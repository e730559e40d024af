// The rule: which keys a query may see, which of them it always keeps, and who shares a selection. Made once,
// from what the schema carries (rule_of() in attention.h checks it); everything else passes it on. No torch
// headers.
#pragma once

#include "common/layout.h"

namespace sparse_attn {

// Far beyond any sequence, and sums of them still fit.
constexpr int64_t kFar = int64_t{1} << 40;

constexpr int64_t within_reach(int64_t number) {
    return number < -kFar ? -kFar : number < kFar ? number : kFar;
}

// A whole number for each query, [B, Tq] of any strides, any values; one pointer is set, or neither: no such
// numbers.
struct PerQuery {
    const int32_t* narrow;
    const int64_t* wide;
    int64_t b, t;  // strides

    constexpr bool given() const { return narrow || wide; }
    constexpr int64_t at(int64_t batch, int64_t query) const {
        const int64_t place = batch * b + query * t;
        return narrow ? narrow[place] : wide[place];
    }
};

struct Rule {
    const uint8_t* mask;     // bool [B, G, Tq, Tk], 1 = may attend, or null
    const int64_t* lengths;  // [B], each in [0, Tk], or null: keys past it do not exist
    Strides mask_strides;
    PerQuery starts;           // keys before it do not exist for that query
    PerQuery offsets;          // causal_offset, where each query has its own
    int64_t causal_offset;     // with is_causal query i sees keys 0 … i + causal_offset
    int64_t window;            // always kept: the last keys up to that one
    int64_t sinks;             // always kept: the first keys from the start on
    int64_t groups;            // G, selections per batch entry: Hq, Hkv or 1
    float scale;               // of q·k
    float softcap;             // scores are softcap · tanh(scale · q·k / softcap); 0: none
    const float* sink_logits;  // [Hq], contiguous: one more logit per query head, without a value; or null
    bool is_causal;

    // The last key that a query sees, with is_causal; it may lie beyond either end.
    constexpr int64_t last_key(int64_t batch, int64_t query) const {
        return query + (offsets.given() ? within_reach(offsets.at(batch, query)) : causal_offset);
    }

    // Where the first keys that are always kept end, of a query whose keys begin there.
    constexpr int64_t sink_end(int64_t begin) const { return begin + sinks; }

    // At most so many keys of a query are always kept.
    int64_t kept() const { return window + sinks; }
};

// The schema's numbers: [is_causal, causal_offset, window, sinks, groups].
constexpr int64_t kRuleNumbers = 5;

// Without mask, lengths, starts and offsets of queries. Whether the numbers mean anything; then they are
// limited to what makes a difference.
inline bool read_rule(Rule& rule, const int64_t* numbers, int64_t count) {
    if (count != kRuleNumbers || (numbers[0] != 0 && numbers[0] != 1) || numbers[2] < 0 || numbers[3] < 0)
        return false;
    const int64_t offset = numbers[1], window = numbers[2], sinks = numbers[3];
    rule.is_causal = numbers[0] != 0;
    rule.causal_offset = within_reach(offset);
    rule.window = window < kFar ? window : kFar;
    rule.sinks = sinks < kFar ? sinks : kFar;
    rule.groups = numbers[4];
    return true;
}

}  // namespace sparse_attn
