// The pairs of a tile of queries and the keys that they attend to, key by key: what a query's index row
// names, transposed.
//
// Sums over a key's queries stay in registers then, and the queries' rows, which are what is looked up, are
// those of a tile and lie in the second-level cache.
#pragma once

#include "rows.h"
#include "scratch.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

// Queries of a tile: their rows fill a part of the second-level cache. A function of the shapes alone.
SPARSE_ATTN_INLINE int64_t tile_queries(int64_t slots, int64_t row_bytes) {
    return clamp<int64_t>(minimum((1 << 18) / row_bytes, (1 << 16) / maximum<int64_t>(slots, 1)), 16, 512);
}

struct KeyLists {
    int64_t slots, block_keys;
    int32_t *keys, *slot_of;  // as filled_slots() has them, query after query
    int32_t* filled;          // of each query
    int32_t* ends;            // [block_keys]: where each key's pairs end
    uint32_t* places;         // of the pairs: query · slots + slot, counted from the tile's first query
    uint64_t inverse;         // 2^48 / slots, rounded up

    static int64_t bytes(int64_t slots, int64_t queries, int64_t block_keys) {
        return 12 * (queries * slots + 2 * Vec::W) + 4 * (queries + block_keys) + 512;
    }
    KeyLists(int64_t slots_, int64_t queries, int64_t block_keys_, Scratch& s)
        : slots(slots_),
          block_keys(block_keys_),
          keys(s.take<int32_t>(queries * slots + 2 * Vec::W)),
          slot_of(s.take<int32_t>(queries * slots + 2 * Vec::W)),
          filled(s.take<int32_t>(queries)),
          ends(s.take<int32_t>(block_keys)),
          places(s.take<uint32_t>(queries * slots)),
          inverse(((uint64_t{1} << 48) + static_cast<uint64_t>(slots) - 1) /
                  static_cast<uint64_t>(maximum<int64_t>(slots, 1))) {}

    // Exact as long as places · slots stay below 2^48.
    SPARSE_ATTN_INLINE int64_t query_of(uint32_t place) const {
        return static_cast<int64_t>(place * inverse >> 48);
    }

    // Lists the pairs of `queries` index rows, `stride` apart, with the keys [block.begin, block.end): each
    // key's in the order of the queries. Returns how many.
    int64_t list(const int32_t* indices, int64_t stride, int64_t queries, Range block) {
        int64_t count = 0;
        for (int64_t i = 0; i < queries; ++i) {
            filled[i] = static_cast<int32_t>(filled_slots(indices + i * stride, slots, block.begin, block.end,
                                                          keys + count, slot_of + count));
            count += filled[i];
        }
        if (count == 0) return 0;
        memset(ends, 0, static_cast<size_t>(block_keys) * 4);
        const int32_t first = static_cast<int32_t>(block.begin);
        for (int64_t n = 0; n < count; ++n) ++ends[keys[n] - first];
        for (int32_t j = 0, sum_of = 0; j < block_keys; ++j) {  // to where each key's list begins
            const int32_t own = ends[j];
            ends[j] = sum_of;
            sum_of += own;
        }
        for (int64_t i = 0, n = 0; i < queries; ++i) {
            const uint32_t row = static_cast<uint32_t>(i * slots);
            for (int32_t left = filled[i]; left > 0; --left, ++n)
                places[ends[keys[n] - first]++] = row + static_cast<uint32_t>(slot_of[n]);
        }
        return count;
    }
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
