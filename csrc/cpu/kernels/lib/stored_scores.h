// Scores of a few queries with all their keys, stored in the second-level cache, and rows of bits that say
// which keys count.
#pragma once

#include "cpu/kernels/masked_attention.h"
#include "gemm_tile.h"
#include "select_stream.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kChunk = kMaskedChunk;
static_assert(MR == kTileRows && NR == kTileCols && kChunk % NR == 0);

SPARSE_ATTN_INLINE uint32_t bits_at(const uint32_t* row, int64_t key) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const char*>(row) + key / 8, 4);
    return word >> (key % 8) & low_bits(W);
}

// The bits of 32 keys from any key on.
SPARSE_ATTN_INLINE uint32_t word_at(const uint32_t* row, int64_t key) {
    uint64_t words;
    memcpy(&words, row + key / 32, 8);
    return static_cast<uint32_t>(words >> (key % 32));
}

// The words of a row of bits, with room for reading a chunk that begins at any key.
SPARSE_ATTN_INLINE int64_t room_for_bits(int64_t key_length) {
    return bit_words(key_length) + kChunk / 32 + 2;
}
SPARSE_ATTN_INLINE int64_t room_for_scores(int64_t key_length) {
    return round_up(key_length, 32) + 2 * kChunk;
}
// Row groups of a task: as many as fit the second-level cache with their scores, at least two.
inline int row_groups(int64_t key_length) {
    constexpr int64_t kCache = W == 16 ? 786432 : 327680;
    int groups = kRowGroups;
    while (groups > 2 && groups * MR * room_for_scores(key_length) * 4 > kCache) --groups;
    return groups;
}

// tile of scores → rows of the stored ones.
template <class Tile>
__attribute__((noinline)) void score_into(float* scores, int64_t stride, const float* queries,
                                          const float* panel, int64_t word_count) {
    Vec acc[MR][NV];
    accumulate<Tile>(acc, queries, panel, word_count);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(scores + r * stride + v * W, acc[r][v]);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
