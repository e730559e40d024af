// What dense tiles and gathering cost on this machine, and which of them a query gets.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/export.h"

namespace sparse_attn {

// Nanoseconds of one thread. Lengths are those of the products: D, Dv or their sum.
struct TileCosts {
    double gather;           // a component of a gathered key or value, forward
    double candidate;        // a key that passes the running threshold
    double tile_key;         // a key in a tile: comparisons, exponential
    double tile;             // a component of a key or value in a tile, forward
    double gather_backward;  // a component of a gathered key or value, backward
    double tile_key_backward, tile_backward;
};

// Those in use, and their change, for the whole process.
SPARSE_ATTN_EXPORT TileCosts tile_costs();
SPARSE_ATTN_EXPORT void set_tile_costs(const TileCosts&);

// Whether a query that keeps up to top_k of the keys that it sees is served by tiles.
SPARSE_ATTN_EXPORT bool tiles_pay(const TileCosts&, int64_t visible, int64_t top_k, int64_t head_dim,
                                  int64_t value_dim);

// Whether the gradient of queries that see from `first` to all `keys` keys, each one key more or so, is
// cheaper by tiles; `width` is D + Dv.
SPARSE_ATTN_EXPORT bool backward_tiles_pay(const TileCosts&, int64_t first, int64_t keys, int64_t top_k,
                                           int64_t width);

enum class Ways { kAuto, kGather, kTiles };  // by cost; always the one or the other, where it can be
SPARSE_ATTN_EXPORT void use_tiles(Ways);
SPARSE_ATTN_EXPORT Ways tiles_used();

}  // namespace sparse_attn
