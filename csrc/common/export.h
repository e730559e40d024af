// What sparse_attn._C takes from libsparse_attn: all else in the library is hidden.
#pragma once

#define SPARSE_ATTN_EXPORT __attribute__((visibility("default")))
