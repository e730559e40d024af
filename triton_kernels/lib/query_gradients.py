"""The backward of `block_attention` and of tails, of queries: dQ and δ.

With P the probabilities and δ = Σ dO ∘ O − dLSE of a row: dS = P ∘ (dO·Vᵀ − δ), dQ = s·dS·K. `tile_queries` walks the
rows of keys that a tile's forward has walked, and writes δ down for those of keys (key_gradients.py).

With MEAN (tile_attention.py) a key that was not chosen has the mean in place of its value: its dO·v is the row's
dO·mean, which is made first and written down, and each of them has the same part of the mean's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import is_half, outer_program, rounded
from .dot import dot
from .rows import load_rows, multiply_rows
from .softmax import base_of, gradient_step
from .tile_rows import row_block, seen_and_chosen, words_of_rows
from .tile_walk import VARYING, blocks_of_tile, tile_of_queries, walk_begins, walk_goes_on
from .tuning import distinct


@triton.jit
def _query_step(
    queries,  # [BLOCK_M, D]
    grads,  # [BLOCK_M, Dv]
    key,
    value,
    words_of,
    first,  # of the keys, where there are no blocks
    place,  # int32 [BLOCK_K]
    inside,
    low,
    high,
    base,
    delta,  # float32 [BLOCK_M]
    tail,  # float32 [BLOCK_M] with MEAN: dO·mean
    gradient,  # float32 [BLOCK_M, D]
    key_t, key_d, value_t, value_d,
    factor,
    bound,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ with one step added."""
    row = place.to(tl.int64)
    keys, scores = multiply_rows(queries, key, row, inside, key_t, key_d, DIM, BLOCK_DIM, BLOCK_M, BLOCK_K)
    _, slopes = multiply_rows(
        grads, value, row, inside, value_t, value_d, VALUE_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_K
    )
    scores *= factor
    seen, bias, chosen = seen_and_chosen(
        words_of, first, place[None, :], inside[None, :], low[:, None], high[:, None], UNIT, BLOCK_K, MEAN
    )
    if MEAN:
        slopes = tl.where(chosen, slopes, tail[:, None])
    _, slopes = gradient_step(scores, slopes, bias, seen, base[:, None], delta[:, None], bound)
    return dot(rounded(slopes, keys.dtype), keys, gradient)


@triton.jit
def _of_mean(
    grads,  # [BLOCK_M, Dv]
    value,
    words_of,
    low,
    high,
    tile_low,
    tile_high,
    value_t,
    value_d,
    UNIT: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(dO·mean, how many values that is of), float32 [BLOCK_M]: of what each row sees and did not choose."""
    along, left = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.int32)
    steps, begin, none = walk_begins(None, 0, 0, 0, 0, tile_low, tile_high, BLOCK_K)
    for step in range(steps):
        start, place, inside, _ = walk_goes_on(
            step, begin, none, None, 0, 0, 0, 0, tile_low, tile_high, BLOCK_K
        )
        _, products = multiply_rows(
            grads,
            value,
            place.to(tl.int64),
            inside,
            value_t,
            value_d,
            VALUE_DIM,
            BLOCK_VALUE,
            BLOCK_M,
            BLOCK_K,
        )
        seen, _, chosen = seen_and_chosen(
            words_of, start, place[None, :], inside[None, :], low[:, None], high[:, None], UNIT, BLOCK_K, True
        )
        other = seen & ~chosen
        along += tl.sum(tl.where(other, products, 0.0), axis=1)
        left += tl.sum(other.to(tl.int32), axis=1)
    count = tl.maximum(left, 1).to(tl.float32)
    return along / count, count


@triton.jit(do_not_specialize=VARYING)
def tile_queries(
    grad_out,  # [B, Hq, Tq, Dv]
    grad_lse,  # float32 [B, Hq, Tq], contiguous, or None
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, N, D]
    value,  # [B, Hkv, N, Dv]
    blocks,  # int32 [B, G, tiles, M], or None: all rows of keys
    words,  # int32 [B, G, chunk, N · words], or None
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    causal_offsets,  # int [B, Tq] or None
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    outside,  # float32 [B, Hq, Tq], contiguous, with MEAN: the probability of what was not chosen; or None
    deltas,  # float32 [B, Hq, Tq], written
    tails,  # float32 [2, B, Hq, Tq], written with MEAN: dO·mean, and each of the values' part of `outside`; or None
    grad_query,  # [B, Hq, Tq, D], contiguous
    grad_b, grad_h, grad_t, grad_d,
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
    scale,
    IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows of a unit, and their δ."""
    program = outer_program()
    if program >= programs:
        return
    b, unit, tile, present, local, t, head, low, high, tile_low, tile_high = tile_of_queries(
        program, lengths, starts, causal_offsets, starts_b, starts_t, causal_offsets_b, causal_offsets_t, units, shared,
        chunk, first_query, key_length, key_rows, causal_offset, query_tile, subs, IS_CAUSAL, UNIT, BLOCK_M,
    )  # fmt: skip
    kv_head = (unit * kv_heads // units).to(tl.int64)
    far = t.to(tl.int64)
    queries = load_rows(
        query + b * query_b, head * query_h + far * query_t, present, 1, query_d, DIM, BLOCK_DIM
    )
    grads = load_rows(
        grad_out + b * grad_b, head * grad_h + far * grad_t, present, 1, grad_d, VALUE_DIM, BLOCK_VALUE
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
    at = (b * units * shared + head) * query_length + t
    base = base_of(tl.load(lse + at, mask=present, other=float("-inf")))
    gradient = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    outs = load_rows(out, at, present, VALUE_DIM, 1, VALUE_DIM, BLOCK_VALUE)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=present, other=0.0)
    tl.store(deltas + at, delta, mask=present)
    tail = 0.0
    if MEAN:
        tail, count = _of_mean(
            grads, value, words_of, low, high, tile_low, tile_high, value_t, value_d, UNIT, VALUE_DIM, BLOCK_VALUE,
            BLOCK_M, BLOCK_K,
        )  # fmt: skip
        tl.store(tails + at, tail, mask=present)
        share = tl.load(outside + at, mask=present, other=0.0) / count
        rows = (programs // units).to(tl.int64) * (units * shared)  # B · Hq
        tl.store(tails + (rows * query_length + at), share, mask=present)
    steps, begin, block = walk_begins(
        blocks_of, blocks_m, slots, block_size, key_rows, tile_low, tile_high, BLOCK_K
    )
    for step in range(steps):
        start, place, inside, next_block = walk_goes_on(
            step, begin, block, blocks_of, blocks_m, slots, block_size, key_rows, tile_low, tile_high, BLOCK_K
        )
        gradient = _query_step(
            queries, grads, key, value, words_of, start, place, inside, low, high, base, delta, tail, gradient, key_t,
            key_d, value_t, value_d, factor, bound, UNIT, MEAN, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, BLOCK_M,
            BLOCK_K,
        )  # fmt: skip
        block = next_block
    column = tl.arange(0, BLOCK_DIM)
    tl.store(
        grad_query + at[:, None] * DIM + column[None, :],
        rounded(gradient * scale, grad_query.dtype.element_ty),
        mask=present[:, None] & (column < DIM)[None, :],
    )


def warps_of(dim: int) -> int:
    """8 of AMD's warps have half as many registers each, and 4 are as many threads as 8 here."""
    return 4 if dim <= 64 or torch.version.hip else 8


def query_configs(
    rows: int, dtype, dim: int, value_dim: int, block_size: int, mean: bool = False
) -> list[dict[str, int]]:
    """Block sizes of `tile_queries`: dQ and two tiles of scores are in registers at once."""
    wide, half = max(dim, value_dim), is_half(dtype)
    size = (64 if wide <= 64 else 32) if half else 16
    keys = max(16, min(triton.next_power_of_2(block_size), size))
    tile = max(16, row_block(rows, dtype) // (2 if wide > (128 if half else 0 if mean else 64) else 1))
    many = warps_of(128 if mean and not half else wide)
    some = ((keys, many, 2), (max(16, keys // 2), 4, 3), (2 * keys, 8, 2)) if half else ((keys, many, 2),)
    return distinct(
        [{"BLOCK_M": tile, "BLOCK_K": k, "num_warps": warps, "num_stages": n} for k, warps, n in some]
    )
