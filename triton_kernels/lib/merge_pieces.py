"""The best of a row's candidates, written in order; and the kernel that takes them where the keys were in pieces."""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import LARGEST, find_cut, index_of, kept_slots, score_of
from .visible_keys import first_keys, window_starts


@triton.jit
def kept_until(starts, batch, position, starts_b, starts_t, length, first_kept):
    """Up to where each query always keeps its first keys, int32 [Q, 1]."""
    first = first_keys(starts, batch, position, starts_b, starts_t, length)
    return (first + tl.minimum(first_kept, length - first))[:, None]


@triton.jit
def emit(
    rows,  # pointer to each row of slots, [Q]
    count,  # int32 [Q]
    valid,  # int1 [Q]: rows that exist
    first_kept,  # int32, or [Q, 1]
    window_start,  # int32 [Q]
    budget,
    place,  # int64 [Q]: where each row's output begins
    indices,
    scores,
    SPLIT: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Writes the best of each row, ascending, then −1. Returns the lowest order key that is kept, int32 [Q]."""
    low, equal, size = find_cut(rows, count, first_kept, window_start, budget, 0, CAPACITY, CHUNK)
    written = tl.zeros_like(count)
    equal_seen = tl.zeros_like(count)
    for first in range(0, tl.max(count, 0), STEP):
        column = first + tl.arange(0, STEP)
        slot, keep, equal_seen = kept_slots(
            rows, column, count, first_kept, window_start, low, equal, equal_seen
        )
        target = place[:, None] + written[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        written += tl.sum(keep.to(tl.int32), 1)
        keep &= valid[:, None]
        if SPLIT:
            tl.store(indices + target, slot, mask=keep)
        else:
            tl.store(indices + target, index_of(slot), mask=keep)
            if scores is not None:
                tl.store(scores + target, score_of(slot), mask=keep)
    for first in range(0, budget, STEP):
        column = first + tl.arange(0, STEP)
        empty = valid[:, None] & (column[None, :] >= written[:, None]) & (column[None, :] < budget)
        tl.store(indices + place[:, None] + column[None, :], -1, mask=empty)
        if not SPLIT and scores is not None:
            tl.store(scores + place[:, None] + column[None, :], float("-inf"), mask=empty)
    return low


@triton.jit(
    do_not_specialize=[
        "rows", "query_length", "key_length", "width", "window_offset", "first_kept", "starts_b", "offsets_b",
    ]
)  # fmt: skip
def merge_pieces(
    slots,  # int64 [rows, splits · K], ascending keys, index −1 where empty
    indices,  # int32 [rows, K]
    scores,  # float32 [rows, K] or None
    wanted,  # int32 [rows]: 0 where the row is there already; or None
    starts,  # int [B, Tq] or None
    offsets,  # int [B, Tq] or None
    starts_b,
    starts_t,
    offsets_b,
    offsets_t,
    rows,
    groups,
    query_length,
    key_length,
    width,  # splits · K
    budget,
    window_offset,
    first_kept,
    IS_CAUSAL: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The best K of the rows' candidates from all splits of the keys."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    if wanted is not None:
        valid &= tl.load(wanted + row) != 0
    count = tl.where(valid, width, 0)
    start = LARGEST + tl.zeros_like(count)
    batch, position = row // query_length // groups, (row % query_length).to(tl.int32)
    if IS_CAUSAL:
        start = window_starts(offsets, batch, position, offsets_b, offsets_t, window_offset, key_length)
    kept = first_kept
    if starts is not None:
        kept = kept_until(starts, batch, position, starts_b, starts_t, key_length, first_kept)
    emit(
        slots + row * width, count, valid, kept, start, budget,
        row * budget, indices, scores, False, CAPACITY, CHUNK, STEP,
    )  # fmt: skip
