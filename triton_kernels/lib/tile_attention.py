"""The forward of `block_attention` and of tails: one online softmax over the rows of keys that a tile names.

A program has BLOCK_M rows of one unit (tile_rows.py) and walks the blocks that its tile of queries chose, or all rows
of keys (tile_walk.py).

With MEAN the softmax is over all keys, and those that a query did not choose count with the mean of their values:
beside the weighted sum of the chosen ones there is a plain sum of the others, which is a product with zeros and ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LN2, grid_of, is_half, outer_program, rounded
from .dot import dot
from .rows import load_rows, multiply_rows
from .soft_cap import capped
from .softmax import first_of_softmax, softmax_step
from .tile_rows import Shape, row_block, seen_and_bias, seen_and_chosen, strides, words_of_rows
from .tile_walk import VARYING, blocks_of_tile, tile_of_queries, walk_begins, walk_goes_on
from .tuning import distinct, run_tuned, size_class


@triton.jit
def _weigh(
    queries,  # [BLOCK_M, D]
    key,  # of this head
    value,
    words_of,  # pointer to the words of each query [BLOCK_M, 1], or None
    place,  # int32 [BLOCK_K]
    inside,  # bool [BLOCK_K]
    low,  # int32 [BLOCK_M]
    high,
    largest,
    total,
    mean,
    key_t, key_d, value_t, value_d,
    factor,
    bound,
    UNIT: tl.constexpr,
    SPECIAL: tl.constexpr,  # there may be values that are no numbers: of those a row does not see 0 · NaN is 0
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step: (largest, total, mean)."""
    row = place.to(tl.int64)
    _, scores = multiply_rows(queries, key, row, inside, key_t, key_d, DIM, BLOCK_DIM, BLOCK_M, BLOCK_K)
    values = load_rows(value, row, inside, value_t, value_d, VALUE_DIM, BLOCK_VALUE)
    scores = capped(scores * factor, bound)
    seen, bias = seen_and_bias(words_of, place[None, :], inside[None, :], low[:, None], high[:, None], UNIT)
    scores = tl.where(seen, scores + bias, float("-inf"))
    weights, shrink, largest, total = softmax_step(scores, largest, total)
    mean = _add_values(mean * shrink[:, None], weights, seen, values, SPECIAL, BLOCK_M, BLOCK_VALUE)
    return largest, total, mean


@triton.jit
def _add_values(
    total,  # float32 [BLOCK_M, BLOCK_VALUE]
    weights,  # float32 [BLOCK_M, BLOCK_K], 0 where a value does not count
    counted,  # bool, likewise
    values,  # [BLOCK_K, BLOCK_VALUE]
    SPECIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """total + weights · values."""
    weights = rounded(weights, values.dtype)
    if SPECIAL:
        finite = tl.abs(values.to(tl.float32)) < float("inf")
        numbers = tl.where(finite, values, 0.0)
        seen_of = rounded(tl.where(counted, 1.0, 0.0), values.dtype)
        broken = rounded(tl.where(finite, 0.0, 1.0), values.dtype)
        touched = dot(seen_of, broken, tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32))
        whole = dot(weights, values, total)
        total = tl.where(touched > 0.0, whole, dot(weights, numbers, total))
    else:
        total = dot(weights, values, total)
    return total


@triton.jit
def _weigh_with_rest(
    queries,  # [BLOCK_M, D]
    key,  # of this head
    value,
    words_of,  # pointer to the words of each query [BLOCK_M, 1]
    first,  # of the keys
    place,  # int32 [BLOCK_K]
    inside,  # bool [BLOCK_K]
    low,  # int32 [BLOCK_M]
    high,
    largest,
    total,
    mean,
    outside,  # float32 [BLOCK_M]: of `total` what keys have that were not chosen
    left,  # int32 [BLOCK_M]: how many those are
    rest,  # float32 [BLOCK_M, Dv]: the sum of their values
    key_t, key_d, value_t, value_d,
    factor,
    bound,
    UNIT: tl.constexpr,
    SPECIAL: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step with MEAN: (largest, total, mean, outside, left, rest)."""
    row = place.to(tl.int64)
    _, scores = multiply_rows(queries, key, row, inside, key_t, key_d, DIM, BLOCK_DIM, BLOCK_M, BLOCK_K)
    values = load_rows(value, row, inside, value_t, value_d, VALUE_DIM, BLOCK_VALUE)
    seen, _, chosen = seen_and_chosen(
        words_of, first, place[None, :], inside[None, :], low[:, None], high[:, None], UNIT, BLOCK_K, True
    )
    scores = tl.where(seen, capped(scores * factor, bound), float("-inf"))
    weights, shrink, largest, total = softmax_step(scores, largest, total)
    other = seen & ~chosen
    outside = outside * shrink + tl.sum(tl.where(chosen, 0.0, weights), axis=1)
    left += tl.sum(other.to(tl.int32), axis=1)
    kept = tl.where(chosen, weights, 0.0)
    mean = _add_values(mean * shrink[:, None], kept, chosen, values, SPECIAL, BLOCK_M, BLOCK_VALUE)
    ones = tl.where(other, 1.0, 0.0)
    rest = _add_values(rest, ones, other, values, SPECIAL, BLOCK_M, BLOCK_VALUE)
    return largest, total, mean, outside, left, rest


@triton.jit(do_not_specialize=VARYING)
def attend_tiles(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, N, D]
    value,  # [B, Hkv, N, Dv]
    blocks,  # int32 [B, G, tiles, M], or None: all rows of keys
    words,  # int32 [B, G, chunk, N · words], or None
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    causal_offsets,  # int [B, Tq] or None
    sink_logits,  # float32 [Hq], contiguous, or None
    extremes,  # float32 [2]: the smallest and the largest value
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    outside,  # float32 [B, Hq, Tq], contiguous, with MEAN: the probability of what was not chosen; or None
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    blocks_b, blocks_g, blocks_n, blocks_m,
    starts_b, starts_t,
    causal_offsets_b, causal_offsets_t,
    programs,  # B · units
    units,
    shared,  # heads in a unit
    kv_heads,
    groups,
    query_length,
    chunk,  # queries of this launch
    first_query,
    key_length,
    key_rows,  # N
    causal_offset,
    query_tile,  # queries that share blocks; without blocks all of the chunk
    subs,  # tiles of BLOCK_M rows in those
    block_size,
    slots,  # M
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    SPECIAL: tl.constexpr,  # for calls with values that are no numbers; the other one is for those without
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = outer_program()
    finite = tl.maximum(tl.abs(tl.load(extremes)), tl.abs(tl.load(extremes + 1))) < float("inf")
    if (program >= programs) | (finite == SPECIAL):
        return
    b, unit, tile, present, local, t, head, low, high, tile_low, tile_high = tile_of_queries(
        program, lengths, starts, causal_offsets, starts_b, starts_t, causal_offsets_b, causal_offsets_t, units, shared,
        chunk, first_query, key_length, key_rows, causal_offset, query_tile, subs, IS_CAUSAL, UNIT, BLOCK_M,
    )  # fmt: skip
    kv_head = (unit * kv_heads // units).to(tl.int64)
    queries = load_rows(
        query + b * query_b, head * query_h + t.to(tl.int64) * query_t, present, 1, query_d, DIM, BLOCK_DIM
    )
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    blocks_of = None
    if blocks is not None:
        blocks_of = blocks_of_tile(blocks, b, unit, tile, units, groups, blocks_b, blocks_g, blocks_n)
    words_of = None
    if words is not None:
        words_of = words_of_rows(words, b, local, head, units * shared, groups, chunk, key_rows, UNIT, MEAN)[
            :, None
        ]

    largest, total = first_of_softmax(sink_logits, head, present, BLOCK_M)
    mean = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
    if MEAN:
        probability, left = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.int32)
        rest = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
    steps, begin, block = walk_begins(
        blocks_of, blocks_m, slots, block_size, key_rows, tile_low, tile_high, BLOCK_K
    )
    for step in range(steps):
        start, place, inside, next_block = walk_goes_on(
            step, begin, block, blocks_of, blocks_m, slots, block_size, key_rows, tile_low, tile_high, BLOCK_K
        )
        if MEAN:
            largest, total, mean, probability, left, rest = _weigh_with_rest(
                queries, key, value, words_of, start, place, inside, low, high, largest, total, mean, probability, left,
                rest, key_t, key_d, value_t, value_d, factor, bound, UNIT, SPECIAL, DIM, VALUE_DIM, BLOCK_DIM,
                BLOCK_VALUE, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        else:
            largest, total, mean = _weigh(
                queries, key, value, words_of, place, inside, low, high, largest, total, mean, key_t, key_d, value_t,
                value_d, factor, bound, UNIT, SPECIAL, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        block = next_block
    if MEAN:
        mean += rest * (probability / tl.maximum(left, 1).to(tl.float32))[:, None]

    at = (b * units * shared + head) * query_length + t
    column = tl.arange(0, BLOCK_VALUE)
    total = tl.where(total == 0.0, 1.0, total)  # nothing attended to: 0, and an LSE of −inf by `largest`
    tl.store(
        out + at[:, None] * VALUE_DIM + column[None, :],
        rounded(mean / total[:, None], out.dtype.element_ty),
        mask=present[:, None] & (column < VALUE_DIM)[None, :],
    )
    tl.store(lse + at, (largest + tl.log2(total)) * LN2, mask=present)
    if MEAN:
        tl.store(outside + at, probability / total, mask=present)


def attend_configs(
    rows: int, dtype, dim: int, value_dim: int, block_size: int, counted: bool, mean: bool
) -> list[dict[str, int]]:
    """Block sizes of `attend_tiles`; the others keep fewer keys, or more, on their way."""
    wide, half = max(dim, value_dim), is_half(dtype)
    size = 16 if not half or (counted and wide > 128) else 64 if wide <= 64 and not mean else 32
    most = max(16, triton.next_power_of_2(block_size))
    # With the mean there are two sums of values.
    rows = row_block(rows, dtype) // (2 if wide > (64 if mean else 128 if not half else 256) else 1)
    # The words of a tile take registers, too, and so do products in float32. 8 warps of AMD's have half as many each.
    most_of_4 = 128 if half and (mean or not counted) else 0 if mean else 64
    warps = 8 if wide > most_of_4 and not torch.version.hip else 4
    some = (
        ((size, warps, 2), (size // 2, warps, 3), (2 * size, 8, 2))
        if half
        else ((size, warps, 1 if mean else 2),)
    )
    return distinct(
        [
            {
                "BLOCK_M": max(16, rows),
                "BLOCK_K": max(16, min(most, keys)),
                "num_warps": warps,
                "num_stages": stages,
            }
            for keys, warps, stages in some
        ]
    )


def launch_attend(
    query: Tensor,
    value: Tensor,
    shape: Shape,
    tiles: int,
    rows: int,
    block_size: int,
    outside: Tensor | None = None,  # float32 [B, Hq, Tq] with MEAN
    **arguments,
) -> None:
    """`attend_tiles` twice, of which one returns at once: which of them is wanted only the device knows.

    Values that are no numbers take products of their own: 0 · NaN of a key that a query does not see is 0.
    """
    extremes = value.new_zeros(2) if value.numel() == 0 else torch.stack(value.aminmax())
    counted = arguments["words"] is not None
    mean = outside is not None
    configs = attend_configs(rows, query.dtype, shape.dim, shape.value_dim, block_size, counted, mean)
    few = {"BLOCK_K": 16, "num_warps": 4 if mean and torch.version.hip else 8, "num_stages": 1}
    most = (
        16 if max(shape.dim, shape.value_dim) > 128 else 32 if mean else 64
    )  # registers for three tiles of rows
    few["BLOCK_M"] = min(most, configs[0]["BLOCK_M"])
    for special in (False, True):
        launch(
            f"attend_tiles{' mean' if mean else ''}{' special' if special else ''}", attend_tiles,
            [configs[0] | few] if special else configs,
            query, shape, tiles, rows, value=value, **strides("value", value), extremes=extremes.float(),
            outside=outside, block_size=block_size, MEAN=mean, SPECIAL=special, **arguments,
        )  # fmt: skip


def launch(
    name: str,
    kernel,
    configs: list[dict[str, int]],
    query: Tensor,
    shape: Shape,
    tiles: int,
    rows: int,  # of one tile
    **arguments,
) -> None:
    """One launch over the rows of all units."""
    programs = shape.batch * shape.units

    def run(config: dict[str, int]) -> None:
        subs = triton.cdiv(rows, config["BLOCK_M"])
        kernel[grid_of(tiles * subs, programs)](
            query=query, **strides("query", query), programs=programs, units=shape.units, shared=shape.shared,
            kv_heads=shape.kv_heads, groups=shape.groups, query_length=shape.query_length, key_rows=shape.key_rows,
            subs=subs, **shape.dims(), **arguments, **config,
        )  # fmt: skip

    run_tuned(
        name,
        (
            query.dtype,
            shape.shared,
            shape.dim,
            shape.value_dim,
            size_class(rows),
            size_class(tiles * programs),
        ),
        configs,
        run,
        query.device,
    )
