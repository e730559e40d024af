// How often each token id occurs in a stretch of a token file. Plain integers: neither torch nor SIMD.
#pragma once

#include <cstdint>

#include "common/export.h"

namespace sparse_attn {

// Adds to counts [vocabulary] the occurrences in tokens [n], n < 2^32, on torch's threads. Returns the
// position of the first id that is not below `vocabulary`, or -1; with one, counts hold the others all the
// same.
SPARSE_ATTN_EXPORT int64_t count_tokens(const uint16_t* tokens, int64_t n, int64_t vocabulary,
                                        int64_t* counts);
SPARSE_ATTN_EXPORT int64_t count_tokens(const uint32_t* tokens, int64_t n, int64_t vocabulary,
                                        int64_t* counts);

// The largest id of tokens [n], -1 if there is none.
SPARSE_ATTN_EXPORT int64_t largest_token(const uint16_t* tokens, int64_t n);
SPARSE_ATTN_EXPORT int64_t largest_token(const uint32_t* tokens, int64_t n);

}  // namespace sparse_attn
