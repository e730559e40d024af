"""A key index: the scores that it leaves possible, and whether candidates chosen by them hold the best keys.

With μ the shift of a head, k̂ and q̂ the rounded k − μ and q, s the product that a tile makes of q and k,

    |s − q·μ − q̂·k̂| ≤ ‖q − q̂‖·‖k − μ‖ + ‖q̂‖·‖k − μ − k̂‖ + rounding of s and of these numbers

so q̂·k̂ and the right side are the highest score that a key can have, less q·μ, which is one number for all keys. Keys
are ranked by that in place of s, and more of them taken than are wanted; those are scored as a tile scores them. Where
the last of the wanted ones is above all that the index leaves possible for the keys which were not taken, the selection
is proven: no other key can be in it, and none can tie. A row for which that fails is selected without the index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import LARGEST, order_key, pack, threshold_of
from .dot import dot
from .key_tiles import load_keys, load_queries
from .merge_pieces import emit, kept_until
from .visible_keys import window_starts

BLOCK = tl.constexpr(16)  # keys whose components lie side by side
WORD = tl.constexpr(4)  # components of one key that do
MORE = tl.constexpr(1.0 + 5e-5)  # what float32 rounds in sums of squares and in what is made of them


@triton.jit
def highest_scores(
    queries,  # int8 [D, BM]
    step,  # float32 [BM]: margins of each query, as `round_queries` writes them
    norm_factor,
    error_factor,
    rest,
    codes,  # int8 [N, words, 16, 4] of this head
    bounds,  # float32 [N, 3, 16] of this head
    words,
    index,  # int32 [BN]
    exists,  # bool [BN]
    depth,  # [BD]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BN, BM], less q·μ; NaN or infinite where the index knows nothing of a key."""
    block, lane = (index // BLOCK).to(tl.int64), index % BLOCK
    rows = codes + block * (words * (BLOCK * WORD)) + lane * WORD
    components = depth // WORD * (BLOCK * WORD) + depth % WORD
    keys = tl.load(
        rows[:, None] + components[None, :],
        mask=exists[:, None] & (depth < words * WORD)[None, :],
        other=0,
    )
    three = bounds + block * (3 * BLOCK) + lane
    scale = tl.load(three, mask=exists, other=0.0)
    error = tl.load(three + BLOCK, mask=exists, other=0.0)
    norm = tl.load(three + 2 * BLOCK, mask=exists, other=0.0)
    score = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    score = score * (scale[:, None] * step[None, :]) + rest[None, :]
    return score + norm[:, None] * norm_factor[None, :] + error[:, None] * error_factor[None, :]


@triton.jit
def to_whole(x):
    """To the nearest whole number, ties to even, in [−127, 127]."""
    x = (x + 12582912.0) - 12582912.0  # 1.5 · 2^23
    return tl.minimum(tl.maximum(x, -127.0), 127.0)


@triton.jit(do_not_specialize=["heads", "kv_heads", "query_length"])
def round_queries(
    codes,  # int8 [B, Hq, Tq, PITCH], contiguous
    margins,  # float32 [B, Hq, Tq, 4]: step of the codes, and what bounds take of a key's norm, its error and of none
    ceilings,  # float32 [B, Hq, Tq]: no less than q·μ; infinite where the index says nothing of the query
    query,  # [B, Hq, Tq, D]
    shift,  # float32 [B, Hkv, D], contiguous
    query_b,
    query_h,
    query_t,
    query_d,
    heads,
    kv_heads,
    query_length,
    SIGN: tl.constexpr,  # of the scale
    DIM: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = row % query_length
    head = row // query_length % heads
    b = row // query_length // heads
    column = tl.arange(0, BLOCK_D)
    inside = column < DIM
    x = tl.load(query + b * query_b + head * query_h + t * query_t + column * query_d, mask=inside, other=0.0)
    x = x.to(tl.float32) * SIGN
    of_head = b * kv_heads + head * kv_heads // heads
    middle = tl.load(shift + of_head * DIM + column, mask=inside, other=0.0)
    size, far = tl.sqrt(tl.sum(x * x, 0)), tl.sqrt(tl.sum(middle * middle, 0))
    # Of others squares or products could leave float32.
    useful = (size > 1e-10) & (size < 1e18) & (far < 1e18)
    x = tl.where(useful, x, 0.0)
    step = tl.where(useful, tl.max(tl.abs(x), 0) / 127.0, 0.0)
    number = to_whole(tl.where(useful, x / tl.where(useful, step, 1.0), 0.0))
    near = number * step
    error, near_size = tl.sqrt(tl.sum((x - near) * (x - near), 0)), tl.sqrt(tl.sum(near * near, 0))
    UNIT: tl.constexpr = (2 * DIM + 48) * 2.0**-23
    tl.store(codes + row * PITCH + column, number.to(tl.int8), mask=column < PITCH)
    of_norm = tl.where(useful, (error + UNIT * (size + error)) * MORE, 0.0)
    of_error = tl.where(useful, near_size * MORE, 0.0)
    of_none = tl.where(useful, (UNIT * size * far + 1e-30 * (1.0 + size)) * MORE, 0.0)
    tl.store(margins + row * 4, step)
    tl.store(margins + row * 4 + 1, of_norm)
    tl.store(margins + row * 4 + 2, of_error)
    tl.store(margins + row * 4 + 3, of_none)
    along = tl.sum(tl.where(useful, x * middle, 0.0), 0)
    ceiling = along + UNIT * size * far * MORE + tl.abs(along) * 2.0**-21
    tl.store(ceilings + row, tl.where(useful, ceiling, float("inf")))


@triton.jit(
    do_not_specialize=[
        "heads", "query_length", "key_length", "window_offset", "first_kept", "starts_b", "offsets_b",
    ]
)  # fmt: skip
def settle(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    candidates,  # int32 [rows, M], ascending, −1 last
    highest,  # float32 [rows, M]: what the index leaves possible for them
    ceilings,  # float32 [rows]
    starts,  # int [B, Tq] or None
    offsets,  # int [B, Tq] or None
    slots,  # int64 [rows, M], scratch
    indices,  # int32 [rows, K]
    scores,  # float32 [rows, K] or None
    redo,  # int32 [rows], written: 1 where another key might be among the best
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,
    key_d,
    starts_b,
    starts_t,
    offsets_b,
    offsets_t,
    heads,
    query_length,
    key_length,
    head_dim,
    width,  # M
    budget,
    window_offset,
    first_kept,
    SIGN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # as wide as the tiles without an index, of which a row has one column
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Scores one row's candidates as tiles score keys, and writes the best of them."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    position = (row % query_length).to(tl.int32) + one
    head = row // query_length % heads
    batch = row // query_length // heads
    start = LARGEST + tl.zeros_like(position)
    if IS_CAUSAL:
        start = window_starts(offsets, batch, position, offsets_b, offsets_t, window_offset, key_length)
    kept = first_kept
    if starts is not None:
        kept = kept_until(starts, batch, position, starts_b, starts_t, key_length, first_kept)

    depth = tl.arange(0, BLOCK_D)
    inside_depth = depth < head_dim
    place = query + batch * query_b + head * query_h + (row % query_length) * query_t
    same = tl.zeros([BLOCK_M], tl.int64)
    queries = load_queries(place + same, query_d, depth, inside_depth, SIGN)
    key_head = key + batch * key_b + (head // REPEAT) * key_h
    first_column = (tl.arange(0, BLOCK_M) == 0)[None, :]
    lowest = tl.full([1], LARGEST, tl.int32)
    found = tl.zeros([1], tl.int32)
    for first in range(0, width, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        index = tl.load(candidates + row * width + slot, mask=slot < width, other=-1)
        there = index >= 0
        keys = load_keys(key_head, index.to(tl.int64) * key_t, there, key_d, depth, inside_depth)
        tile = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        score = tl.sum(tl.where(first_column, tile, 0.0), 1)
        tl.store(slots + row * width + slot, pack(score, index), mask=slot < width)
        high = tl.load(highest + row * width + slot, mask=slot < width, other=0.0)
        forced = (index[None, :] < kept) | (index[None, :] >= start[:, None])
        order = tl.where(there[None, :] & ~forced, order_key(high)[None, :], LARGEST)
        lowest = tl.minimum(lowest, tl.min(order, 1))
        found += tl.sum(there.to(tl.int32), 0)
    tl.debug_barrier()
    low = emit(
        slots + row * width + one, tl.zeros_like(found) + width, one == 0, kept, start, budget, row * budget + one,
        indices, scores, False, CAPACITY, CHUNK, STEP,
    )  # fmt: skip
    limit = threshold_of(lowest)
    limit += tl.load(ceilings + row) + tl.abs(limit) * 2.0**-21
    # Where fewer than M keys were found they are all that the query sees.
    proven = (found < width) | ((threshold_of(low) > limit) & (lowest < LARGEST))
    tl.store(redo + row + one, tl.where(proven, 0, 1))
