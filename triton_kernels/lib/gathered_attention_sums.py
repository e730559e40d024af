"""The second half of the backward of `gathered_attention`: dK and dV of each key, added up in one fixed order.

Why it is done so stands in gathered_attention_backward.py. A program has one key of one key head and walks the list of
its entries; each lane of a block adds for itself, and the lanes meet at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import outer_program, rounded
from .rows import load_rows
from .soft_cap import tanh
from .softmax import base_of


@triton.jit
def _store_sum(
    target,  # [T, dim] of one key head, contiguous
    row,
    total,  # float32 [BLOCK_DIM]
    ADD: tl.constexpr,  # to what earlier chunks left there
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.arange(0, BLOCK_DIM)
    place = target + row * DIM + column
    if ADD:
        total += tl.load(place, mask=column < DIM, other=0.0)
    tl.store(place, rounded(total, target.dtype.element_ty), mask=column < DIM)


@triton.jit(do_not_specialize=["programs", "entries"])
def sum_entries(
    key_entries,  # entries' dK [B, Hkv, tiles, chunk, K, D]
    value_entries,  # likewise with Dv
    order,  # int32 [B, G, chunk · K]: entries, those of one key together
    offsets,  # int32 [B, G, Tk + 1]: where each key's entries start
    grad_key,  # [B, Hkv, Tk, D], contiguous
    grad_value,  # [B, Hkv, Tk, Dv], contiguous
    programs,  # B · Hkv
    tiles,
    kv_heads,
    groups,
    entries,  # chunk · K
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dK and dV of one key of one key head, from the entries that `_tile_queries` wrote."""
    program = outer_program().to(tl.int64)
    if program >= programs:
        return
    row = tl.program_id(0).to(tl.int64)
    key_length = tl.num_programs(0)
    entry_list = program // kv_heads * groups + program % kv_heads * groups // kv_heads
    bounds = offsets + entry_list * (key_length + 1) + row
    first, last = tl.load(bounds), tl.load(bounds + 1)
    order += entry_list * entries
    to_key = tl.zeros((BLOCK_E, BLOCK_DIM), tl.float32)
    to_value = tl.zeros((BLOCK_E, BLOCK_VALUE), tl.float32)
    for tile in range(tiles):
        start_of = (program * tiles + tile) * entries
        for start in range(first, last, BLOCK_E):
            number = start + tl.arange(0, BLOCK_E)
            valid = number < last
            entry = start_of + tl.load(order + number, mask=valid, other=0)
            to_key += load_rows(key_entries, entry, valid, DIM, 1, DIM, BLOCK_DIM).to(tl.float32)
            to_value += load_rows(value_entries, entry, valid, VALUE_DIM, 1, VALUE_DIM, BLOCK_VALUE).to(
                tl.float32
            )
    _store_sum(grad_key + program * key_length * DIM, row, tl.sum(to_key, axis=0), ADD, DIM, BLOCK_DIM)
    _store_sum(
        grad_value + program * key_length * VALUE_DIM,
        row,
        tl.sum(to_value, axis=0),
        ADD,
        VALUE_DIM,
        BLOCK_VALUE,
    )


@triton.jit(do_not_specialize=["programs", "first_query", "query_length", "entries", "rows_half"])
def sum_queries(
    grad_out,  # [B, Hq, Tq, Dv]
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    value,  # [B, Hkv, Tk, Dv]
    lse,  # float32 [B, Hq, Tq], contiguous
    rows,  # float32 [2, B, Hq, Tq] from _vector_queries
    order,  # int32 [B, G, chunk · K]: entries, those of one key together
    offsets,  # int32 [B, G, Tk + 1]: where each key's entries start
    grad_key,  # [B, Hkv, Tk, D], contiguous
    grad_value,  # [B, Hkv, Tk, Dv], contiguous
    grad_b, grad_h, grad_t, grad_d,
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    programs,  # B · Hkv
    heads,
    kv_heads,
    groups,
    first_query,  # of this chunk
    query_length,
    entries,  # chunk · K
    budget,
    rows_half,  # B · Hq · Tq
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    scale,
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dK and dV of one key of one key head: its queries fetched, their dS and P computed again."""
    program = outer_program()
    if program >= programs:
        return
    row = tl.program_id(0).to(tl.int64)
    key_length = tl.num_programs(0)
    b, kv_head = (program // kv_heads).to(tl.int64), (program % kv_heads).to(tl.int64)
    column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    key += b * key_b + kv_head * key_h + row * key_t
    value += b * value_b + kv_head * value_h + row * value_t
    own_key = tl.load(key + column.to(tl.int64) * key_d, mask=column < DIM, other=0.0).to(tl.float32)
    own_value = tl.load(value + value_column.to(tl.int64) * value_d, mask=value_column < VALUE_DIM, other=0.0)
    own_value = own_value.to(tl.float32)
    to_key = tl.zeros((BLOCK_E, BLOCK_DIM), tl.float32)
    to_value = tl.zeros((BLOCK_E, BLOCK_VALUE), tl.float32)
    shared = heads // kv_heads
    for member in range(shared):
        head = kv_head * shared + member
        entry_list = b * groups + head * groups // heads
        bounds = offsets + entry_list * (key_length + 1) + row
        first, last = tl.load(bounds), tl.load(bounds + 1)
        queries_of = query + b * query_b + head * query_h
        grads_of = grad_out + b * grad_b + head * grad_h
        row_of = (b * heads + head) * query_length
        for start in range(first, last, BLOCK_E):
            number = start + tl.arange(0, BLOCK_E)
            valid = number < last
            entry = tl.load(order + entry_list * entries + number, mask=valid, other=0)
            t = (first_query + entry // budget).to(tl.int64)
            queries = load_rows(queries_of, t, valid, query_t, query_d, DIM, BLOCK_DIM).to(tl.float32)
            grads = load_rows(grads_of, t, valid, grad_t, grad_d, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
            base = base_of(tl.load(lse + row_of + t, mask=valid, other=0.0))
            delta = tl.load(rows + row_of + t, mask=valid, other=0.0)
            inverse = tl.load(rows + rows_half + row_of + t, mask=valid, other=0.0)
            scores = tl.sum(queries * own_key[None, :], axis=1) * factor
            if bound is not None:
                bent = tanh(scores)
                scores = bent * bound
            weights = tl.where(valid, tl.exp2(scores - base) * inverse, 0.0)
            slopes = weights * (tl.sum(grads * own_value[None, :], axis=1) - delta)
            if bound is not None:
                slopes *= 1.0 - bent * bent
            slopes = tl.where(valid, slopes * scale, 0.0)
            to_key += slopes[:, None] * queries
            to_value += weights[:, None] * grads
    _store_sum(
        grad_key + program.to(tl.int64) * key_length * DIM,
        row,
        tl.sum(to_key, axis=0),
        ADD,
        DIM,
        BLOCK_DIM,
    )
    _store_sum(
        grad_value + program.to(tl.int64) * key_length * VALUE_DIM,
        row,
        tl.sum(to_value, axis=0),
        ADD,
        VALUE_DIM,
        BLOCK_VALUE,
    )


def sum_configs(dim: int, value_dim: int) -> list[dict[str, int]]:
    """Block sizes of `sum_entries` and `sum_queries`: 16 elements of each operand per thread.

    The others suit shorter lists (fewer entries at once) and longer ones.
    """
    widest = triton.next_power_of_2(max(dim, value_dim))
    return [
        {"BLOCK_E": min(64, max(8, elements // widest)), "num_warps": warps, "num_stages": 2}
        for elements, warps in ((2048, 4), (1024, 2), (512, 1), (4096, 8))
    ]
