// Which keys there are for a query: the same for every kernel that takes the rule.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// The keys from the query's start to its last, whatever the mask says; empty where begin == end.
SPARSE_ATTN_INLINE Range key_range(const Rule& rule, int64_t b, int64_t query, int64_t key_length) {
    int64_t end = rule.lengths ? rule.lengths[b] : key_length;
    if (rule.is_causal) end = clamp<int64_t>(query + rule.causal_offset + 1, 0, end);
    int64_t begin = 0;
    const int64_t at = b * rule.starts_b + query * rule.starts_t;
    if (rule.narrow_starts) begin = rule.narrow_starts[at];
    if (rule.wide_starts) begin = rule.wide_starts[at];
    return {clamp<int64_t>(begin, 0, end), end};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
