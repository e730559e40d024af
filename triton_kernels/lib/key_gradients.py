"""The backward of `block_attention` and of tails, of keys and values: rows of keys in their own order.

dK = s·dSᵀ·Q, dV = Pᵀ·dO (query_gradients.py has what these are). `tile_keys` has some rows of keys and walks the tiles
of queries that chose their block, in the order of the queries, or all that see them: one order, so the result never
differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import is_half, outer_program, rounded
from .dot import dot
from .query_gradients import warps_of
from .rows import load_rows
from .softmax import base_of, gradient_step
from .tile_rows import row_block, row_limits, rows_of_unit, seen_and_chosen, words_of_rows
from .tile_walk import VARYING
from .tuning import distinct


@triton.jit
def _key_step(
    row,  # int32 [BLOCK_M]: rows of a unit's queries
    end,  # of the rows
    keys,  # [BLOCK_K, D]
    values,  # [BLOCK_K, Dv]
    first,  # of the keys, where there are no lists
    place,  # int32 [BLOCK_K]
    inside,
    grad_key,  # float32 [BLOCK_K, D]
    grad_value,  # float32 [BLOCK_K, Dv]
    grad_out, query, words, lengths, starts, causal_offsets, lse, deltas, tails,  # as in `tile_keys`
    grad_b, grad_h, grad_t, grad_d,
    query_b, query_h, query_t, query_d,
    starts_b, starts_t,
    causal_offsets_b, causal_offsets_t,
    b, unit, units, shared, groups, query_length, chunk, first_query, key_length, key_rows, causal_offset,
    heads_of_all,  # B · Hq
    factor,
    bound,
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
    """(grad_key, grad_value) with what BLOCK_M rows of queries add."""
    present, local, t, head = rows_of_unit(row, end, first_query, unit, shared)
    low, high = row_limits(
        t,
        present,
        b,
        lengths,
        starts,
        starts_b,
        starts_t,
        causal_offsets,
        causal_offsets_b,
        causal_offsets_t,
        key_length,
        causal_offset,
        IS_CAUSAL,
        UNIT,
    )
    far = t.to(tl.int64)
    queries = load_rows(
        query + b * query_b, head * query_h + far * query_t, present, 1, query_d, DIM, BLOCK_DIM
    )
    grads = load_rows(
        grad_out + b * grad_b, head * grad_h + far * grad_t, present, 1, grad_d, VALUE_DIM, BLOCK_VALUE
    )
    at = (b * units * shared + head) * query_length + t
    base = base_of(tl.load(lse + at, mask=present, other=float("-inf")))
    delta = tl.load(deltas + at, mask=present, other=0.0)
    words_of = None
    if words is not None:
        words_of = words_of_rows(words, b, local, head, units * shared, groups, chunk, key_rows, UNIT, MEAN)[
            None, :
        ]
    scores = dot(keys, tl.trans(queries), tl.zeros((BLOCK_K, BLOCK_M), tl.float32)) * factor
    slopes = dot(values, tl.trans(grads), tl.zeros((BLOCK_K, BLOCK_M), tl.float32))
    seen, bias, chosen = seen_and_chosen(
        words_of, first, place[:, None], inside[:, None], low[None, :], high[None, :], UNIT, BLOCK_K, MEAN
    )
    if MEAN:
        tail = tl.load(tails + at, mask=present, other=0.0)
        slopes = tl.where(chosen, slopes, tail[None, :])
    weights, slopes = gradient_step(scores, slopes, bias, seen, base[None, :], delta[None, :], bound)
    if MEAN:
        share = tl.load(tails + (heads_of_all * query_length + at), mask=present, other=0.0)
        weights = tl.where(chosen, weights, tl.where(seen, share[None, :], 0.0))
    grad_key = dot(rounded(slopes, queries.dtype), queries, grad_key)
    grad_value = dot(rounded(weights, grads.dtype), grads, grad_value)
    return grad_key, grad_value


@triton.jit(do_not_specialize=[*VARYING, "parts", "pieces", "piece"])
def tile_keys(
    grad_out,  # [B, Hq, Tq, Dv]
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, N, D]
    value,  # [B, Hkv, N, Dv]
    order,  # int32 [B · G, tiles · M]: entries, those of one block together; or None: all queries
    offsets,  # int32 [B · G, blocks + 1]: where each block's entries start
    words,  # int32 [B, G, chunk, N · words], or None
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    causal_offsets,  # int [B, Tq] or None
    lse,  # float32 [B, Hq, Tq], contiguous
    deltas,  # float32 [B, Hq, Tq]
    tails,  # float32 [2, B, Hq, Tq] with MEAN, as `tile_queries` writes it; or None
    grad_key,  # [B, Hkv, N, D], contiguous; without lists float32 [pieces, B, Hkv, N, D]
    grad_value,  # likewise with Dv
    grad_b, grad_h, grad_t, grad_d,
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    starts_b, starts_t,
    causal_offsets_b, causal_offsets_t,
    programs,  # pieces · B · Hkv
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
    query_tile,  # queries that share blocks
    subs,  # tiles of BLOCK_M rows in those
    block_size,  # without lists N
    slots,  # M
    parts,  # of BLOCK_K rows in a block
    pieces,  # of the queries
    piece,  # rows of a unit in one of them
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
    """dK and dV of BLOCK_K rows of one key head, from one piece of the queries."""
    program = outer_program()
    if program >= programs:
        return
    block = tl.program_id(0) // parts
    first_row = tl.program_id(0) % parts * BLOCK_K  # within the block
    within = first_row + tl.arange(0, BLOCK_K)
    place = block * block_size + within
    inside = (within < block_size) & (place < key_rows)
    number = program % (programs // pieces)
    b = (number // kv_heads).to(tl.int64)
    kv_head = number % kv_heads
    far = place.to(tl.int64)
    keys = load_rows(
        key + b * key_b + kv_head.to(tl.int64) * key_h, far, inside, key_t, key_d, DIM, BLOCK_DIM
    )
    values = load_rows(
        value + b * value_b + kv_head.to(tl.int64) * value_h,
        far,
        inside,
        value_t,
        value_d,
        VALUE_DIM,
        BLOCK_VALUE,
    )
    to_key = tl.zeros((BLOCK_K, BLOCK_DIM), tl.float32)
    to_value = tl.zeros((BLOCK_K, BLOCK_VALUE), tl.float32)
    of_key_head = units // kv_heads
    heads_of_all = (programs // pieces // kv_heads).to(tl.int64) * (units * shared)
    for part in range(of_key_head):
        unit = kv_head * of_key_head + part
        if order is not None:
            row_of = b * groups + unit * groups // units
            entries = tl.cdiv(chunk, query_tile) * slots
            bounds = offsets + row_of * (tl.cdiv(key_rows, block_size) + 1) + block
            first, last = tl.load(bounds), tl.load(bounds + 1)
            order_of = order + row_of * entries
            entry = tl.load(order_of + first, mask=first < last, other=0)
            for step in range((last - first) * subs):
                ahead = first + (step + 1) // subs
                next_entry = tl.load(order_of + ahead, mask=ahead < last, other=0)
                tile = entry // slots
                row = (tile * query_tile * shared + step % subs * BLOCK_M) + tl.arange(0, BLOCK_M)
                end = tl.minimum((tile + 1) * query_tile, chunk) * shared
                to_key, to_value = _key_step(
                    row, end, keys, values, first_row, place, inside, to_key, to_value, grad_out, query, words,
                    lengths, starts, causal_offsets, lse, deltas, tails, grad_b, grad_h, grad_t, grad_d, query_b,
                    query_h, query_t, query_d, starts_b, starts_t, causal_offsets_b, causal_offsets_t, b, unit, units,
                    shared, groups, query_length, chunk, first_query, key_length, key_rows, causal_offset,
                    heads_of_all, factor, bound, IS_CAUSAL, UNIT, MEAN, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE,
                    BLOCK_M, BLOCK_K,
                )  # fmt: skip
                entry = next_entry
        else:
            start = program // (programs // pieces) * piece
            end = tl.minimum(start + piece, chunk * shared)
            if IS_CAUSAL and causal_offsets is None:  # the first query that sees the first of these rows
                sees = (
                    (block * block_size + tl.program_id(0) % parts * BLOCK_K + 1) * UNIT - 1 - causal_offset
                )
                start = tl.maximum(start, (sees - first_query) * shared // BLOCK_M * BLOCK_M)
            for base_row in range(start, end, BLOCK_M):
                row = base_row + tl.arange(0, BLOCK_M)
                wanted = True
                if causal_offsets is not None:  # sequences end to end: most queries are of another one
                    present, _, t, _ = rows_of_unit(row, end, first_query, unit, shared)
                    low, high = row_limits(
                        t, present, b, lengths, starts, starts_b, starts_t, causal_offsets, causal_offsets_b,
                        causal_offsets_t, key_length, causal_offset, IS_CAUSAL, UNIT,
                    )  # fmt: skip
                    wanted = (tl.max(high, 0) > tl.min(place, 0)) & (tl.min(low, 0) <= tl.max(place, 0))
                if wanted:
                    to_key, to_value = _key_step(
                        row, end, keys, values, first_row, place, inside, to_key, to_value, grad_out, query, words,
                        lengths, starts, causal_offsets, lse, deltas, tails, grad_b, grad_h, grad_t, grad_d, query_b,
                        query_h, query_t, query_d, starts_b, starts_t, causal_offsets_b, causal_offsets_t, b, unit,
                        units, shared, groups, query_length, chunk, first_query, key_length, key_rows, causal_offset,
                        heads_of_all, factor, bound, IS_CAUSAL, UNIT, MEAN, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE,
                        BLOCK_M, BLOCK_K,
                    )  # fmt: skip

    column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    at = program.to(tl.int64) * key_rows + far
    tl.store(
        grad_key + at[:, None] * DIM + column[None, :],
        rounded(to_key * scale, grad_key.dtype.element_ty),
        mask=inside[:, None] & (column < DIM)[None, :],
    )
    tl.store(
        grad_value + at[:, None] * VALUE_DIM + value_column[None, :],
        rounded(to_value, grad_value.dtype.element_ty),
        mask=inside[:, None] & (value_column < VALUE_DIM)[None, :],
    )


def key_configs(
    rows: int, dtype, dim: int, value_dim: int, block_size: int, counted: bool = False, mean: bool = False
) -> list[dict[str, int]]:
    """Block sizes of `tile_keys`: dK and dV are in registers beside two tiles of scores, with tails words, too."""
    wide, half = max(dim, value_dim), is_half(dtype)
    size = (64 if wide <= (0 if mean else 128) else 32) if half else 16
    keys = max(16, min(triton.next_power_of_2(block_size), size))
    # AMD's compiler has no layout for the bits of wider tiles.
    narrow = (mean and wide > 128) or (torch.version.hip and (counted or wide > 128))
    tile = min(16 if narrow else 32, row_block(rows, dtype)) if half else 16
    many = 4 if mean and wide <= 128 else warps_of(wide)
    some = ((tile, many, 2), (tile, 12 - many, 2), (16, many, 3)) if half else ((tile, 4, 1),)
    return distinct(
        [{"BLOCK_M": m, "BLOCK_K": keys, "num_warps": warps, "num_stages": n} for m, warps, n in some]
    )
