"""The blocks whose keys alone may be chosen, as bits: one for each block of a tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import grid_of
from .tile_rows import mark_chosen


@triton.jit
def any_in_blocks(
    words_rows,  # pointer to each query's words, [BM]
    first,  # the first key of a tile
    block_size,
    blocks,  # how many there are
    BLOCK_N: tl.constexpr,
):
    """1 where some query of the tile has a block with a key of these, else 0."""
    near, far = first // block_size, tl.minimum((first + BLOCK_N - 1) // block_size, blocks - 1)
    near_word = tl.load(words_rows + near // 32)
    far_word = tl.load(words_rows + far // 32)
    from_near = tl.full((1,), -1, tl.int32) << (near % 32)
    to_far = (tl.full((1,), -1, tl.int32).to(tl.uint32, bitcast=True) >> (31 - far % 32).to(tl.uint32)).to(
        tl.int32, bitcast=True
    )
    one = near_word & from_near & to_far
    two = (near_word & from_near) | (far_word & to_far)
    return tl.max(tl.where(tl.where(near // 32 == far // 32, one, two) != 0, 1, 0), 0)


@triton.jit
def in_blocks(
    words_rows,  # pointer to each query's words, [BM]
    index,  # int32 [BN]
    block_size,
    wanted,  # bool [BN, BM]: of which keys it is asked
):
    """bool [BN, BM]: which keys lie in blocks of the query."""
    block = index // block_size
    word = tl.load(words_rows[None, :] + (block // 32)[:, None], mask=wanted, other=0)
    return ((word >> (block % 32)[:, None]) & 1) != 0


def words_of_blocks(blocks: Tensor, count: int) -> Tensor:
    """blocks int32 [B, G, N, M] of `count` → int32 [B, G, N, ⌈count / 32⌉]."""
    batch, groups, tiles, slots = blocks.shape
    words = blocks.new_zeros((batch, groups, tiles, triton.cdiv(count, 32)))
    if words.numel() and slots:
        mark_chosen[grid_of(tiles, batch * groups)](
            words, blocks, *blocks.stride(), batch * groups, groups, 0, slots, count, words.shape[3],
            UNIT=32, BLOCK_K=32, num_warps=1,
        )  # fmt: skip
    return words
