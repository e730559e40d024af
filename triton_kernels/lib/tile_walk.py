"""Which queries a tile has, and which rows of keys it walks past: forward and backward of whole blocks and of tails.

A tile walks the blocks that its queries chose, or all rows of keys that one of them sees, BLOCK_K rows a step. The
number of the next block is on its way while this one's keys are, so that their loads can be pipelined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_rows import row_limits, rows_of_unit

VARYING = (
    "programs", "query_length", "chunk", "first_query", "key_length", "key_rows", "causal_offset", "query_tile",
    "block_size", "subs", "starts_b", "causal_offsets_b",
)  # fmt: skip


@triton.jit
def tile_of_queries(
    program,  # which batch entry and unit
    lengths, starts, causal_offsets,  # as in the kernels
    starts_b, starts_t, causal_offsets_b, causal_offsets_t,
    units, shared, chunk, first_query, key_length, key_rows, causal_offset, query_tile, subs,
    IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(b, unit, tile, of BLOCK_M rows: present, query of the chunk, query, head, low, high; low, high of the tile)."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of causal attention come first
    tile = number // subs
    unit = program % units
    b = (program // units).to(tl.int64)
    row = (tile * query_tile * shared + number % subs * BLOCK_M) + tl.arange(0, BLOCK_M)
    present, local, t, head = rows_of_unit(
        row, tl.minimum((tile + 1) * query_tile, chunk) * shared, first_query, unit, shared
    )
    low, high = row_limits(
        t, present, b, lengths, starts, starts_b, starts_t, causal_offsets, causal_offsets_b, causal_offsets_t,
        key_length, causal_offset, IS_CAUSAL, UNIT,
    )  # fmt: skip
    high = tl.minimum(high, key_rows)
    tile_low, tile_high = tl.min(tl.where(present, low, key_rows), 0), tl.max(high, 0)
    return b, unit, tile, present, local, t, head, low, high, tile_low, tile_high


@triton.jit
def blocks_of_tile(blocks, b, unit, tile, units, groups, blocks_b, blocks_g, blocks_n):
    """Pointer to the blocks that a tile of a unit's queries chose."""
    group = (unit * groups // units).to(tl.int64)
    return blocks + b * blocks_b + group * blocks_g + tile.to(tl.int64) * blocks_n


@triton.jit
def _listed_steps(
    blocks_of,  # [M], a tile's blocks
    blocks_m,
    slots,  # M
    block_size,
    key_rows,
    high,  # int32: no row of the tile sees this row of keys or a later one
    BLOCK_S: tl.constexpr,
):
    """How many slots there are up to the last one that names a block with a key that some row may see."""
    count = 0
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        block = tl.load(blocks_of + slot.to(tl.int64) * blocks_m, mask=slot < slots, other=-1)
        useful = (block >= 0) & (block < tl.cdiv(key_rows, block_size))
        useful &= tl.where(useful, block, 0) * block_size < high
        count = tl.maximum(count, tl.max(tl.where(useful, slot + 1, 0), 0))
    return count


@triton.jit
def _block_of(blocks_of, blocks_m, slot, slots):
    """The block that a slot names, −1 past the last slot."""
    slot = tl.cast(slot, tl.int64)
    return tl.load(blocks_of + slot * blocks_m, mask=slot < slots, other=-1)


@triton.jit
def _listed_place(
    block,  # int32, may name no block
    part,  # which BLOCK_K rows of it
    block_size,
    key_rows,
    BLOCK_K: tl.constexpr,
):
    """(int32 [K] rows of keys, bool [K] which of them are there) of one step."""
    known = (block >= 0) & (block < tl.cdiv(key_rows, block_size))
    within = part * BLOCK_K + tl.arange(0, BLOCK_K)
    place = tl.where(known, block, 0) * block_size + within
    end = tl.where(known, tl.minimum(key_rows, (block + 1) * block_size), 0)
    return place, place < end


@triton.jit
def walk_begins(
    blocks_of,  # pointer to the tile's blocks, or None: all rows of keys
    blocks_m,
    slots,
    block_size,
    key_rows,
    tile_low,
    tile_high,
    BLOCK_K: tl.constexpr,
):
    """(how many steps, where the first begins, what `walk_goes_on` is told there)."""
    if blocks_of is not None:
        begin, block = 0, _block_of(blocks_of, blocks_m, 0, slots)
        steps = _listed_steps(blocks_of, blocks_m, slots, block_size, key_rows, tile_high, 16)
        steps *= tl.cdiv(block_size, BLOCK_K)
    else:
        begin, block = tile_low // BLOCK_K * BLOCK_K, 0
        steps = tl.cdiv(tl.maximum(tile_high - begin, 0), BLOCK_K)
    return steps, begin, block


@triton.jit
def walk_goes_on(
    step,
    begin,
    block,
    blocks_of,
    blocks_m,
    slots,
    block_size,
    key_rows,
    tile_low,
    tile_high,
    BLOCK_K: tl.constexpr,
):
    """(first row of keys where there are no blocks, int32 [K] rows of keys, bool [K] which of them count, what the next
    step is told)."""
    if blocks_of is not None:
        parts = tl.cdiv(block_size, BLOCK_K)
        first = begin
        next_block = _block_of(blocks_of, blocks_m, (step + 1) // parts, slots)
        place, inside = _listed_place(block, step % parts, block_size, key_rows, BLOCK_K)
        inside &= (place >= tile_low) & (place < tile_high)
    else:
        first, next_block = begin + step * BLOCK_K, block
        place = first + tl.arange(0, BLOCK_K)
        inside = (place >= tile_low) & (place < tile_high)
    return first, place, inside, next_block
