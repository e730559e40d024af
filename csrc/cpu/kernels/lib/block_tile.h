// What both directions of block_attention share: blocks in chunks.
#pragma once

#include "cpu/kernels/block_attention.h"
#include "gemm_tile.h"
#include "key_range.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

constexpr int64_t kChunk = kBlockChunk;
static_assert(kChunk % kTileCols == 0);

// The keys of a chunk: its first, and how many exist in its block and among all.
struct Chunk {
    int64_t first, count;
};
SPARSE_ATTN_INLINE Chunk chunk_of(const BlockParams& p, int64_t chunk) {
    const int64_t block = chunk / p.chunks_per_block, within = chunk % p.chunks_per_block * kChunk;
    const int64_t first = block * p.block_size + within;
    const int64_t count = minimum(kChunk, p.block_size - within);
    return {first, maximum<int64_t>(0, minimum(count, p.attend.key_length - first))};
}
// Which of its keys lie in a range, counted from its first.
SPARSE_ATTN_INLINE Range within(const Chunk& c, Range keys) {
    return {clamp<int64_t>(keys.begin - c.first, 0, c.count), clamp<int64_t>(keys.end - c.first, 0, c.count)};
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
