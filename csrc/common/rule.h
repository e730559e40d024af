// The rule: which keys a query may see, which of them it always keeps, and who shares a selection. Made once,
// from what the schema carries (rule_of() in attention.h checks it); everything else passes it on. No torch
// headers.
#pragma once

#include "common/layout.h"

namespace sparse_attn {

struct Rule {
    const uint8_t* mask;     // bool [B, G, Tq, Tk], 1 = may attend, or null
    const int64_t* lengths;  // [B], each in [0, Tk], or null: keys past it do not exist
    // [B, Tq], any values, one of the two or neither: keys before it do not exist for that query
    const int32_t* narrow_starts;
    const int64_t* wide_starts;
    Strides mask_strides;
    int64_t starts_b, starts_t;  // strides
    int64_t causal_offset;       // with is_causal query i sees keys 0 … i + causal_offset
    int64_t window;              // always kept: the last keys up to that one
    int64_t sinks;               // always kept: the first keys from the start on
    int64_t groups;              // G, selections per batch entry: Hq, Hkv or 1
    float scale;                 // of q·k
    bool is_causal;

    // At most so many keys of a query are always kept.
    int64_t kept() const { return window + sinks; }
};

// The schema's numbers: [is_causal, causal_offset, window, sinks, groups].
constexpr int64_t kRuleNumbers = 5;

// Far beyond any sequence, and sums of them still fit.
constexpr int64_t kFar = int64_t{1} << 40;

// Without mask, lengths and starts. Whether the numbers mean anything; then they are limited to what makes a
// difference.
inline bool read_rule(Rule& rule, const int64_t* numbers, int64_t count) {
    if (count != kRuleNumbers || (numbers[0] != 0 && numbers[0] != 1) || numbers[2] < 0 || numbers[3] < 0)
        return false;
    const int64_t offset = numbers[1], window = numbers[2], sinks = numbers[3];
    rule.is_causal = numbers[0] != 0;
    rule.causal_offset = offset < -kFar ? -kFar : offset > kFar ? kFar : offset;
    rule.window = window < kFar ? window : kFar;
    rule.sinks = sinks < kFar ? sinks : kFar;
    rule.groups = numbers[4];
    return true;
}

}  // namespace sparse_attn
