// Selection by bounds as Python sees it: whether it is used, and what it did.
#pragma once

#include <cstdint>

#include "common/export.h"

namespace sparse_attn {

enum class ByBounds { kAuto, kNever, kAlways };  // by shape; never; wherever it can be done

// For the whole process, for tests and comparisons; rows rounded to 8 bits, to 9 (bfloat16, where it is
// multiplied in tiles) or to 16, 0: by shape.
SPARSE_ATTN_EXPORT void use_bounds(ByBounds, int bits);

// Since the process began: blocks of queries that were selected by bounds, and blocks given up; rows, their
// budgets, the candidates that the bounds left of all keys, those of them that were scored exactly.
struct BoundsCounts {
    int64_t blocks, given_up, rows, budget, kept, scored;
};
SPARSE_ATTN_EXPORT BoundsCounts bounds_counts();

}  // namespace sparse_attn
