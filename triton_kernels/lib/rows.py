"""Rows of keys and values that an index row names, for the kernels that gather."""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot
from .tuning import distinct


@triton.jit
def gather_rows(
    rows_of,  # [K], one row of indices
    start,  # first slot
    stride,  # of rows_of
    budget,  # K
    key_length,  # Tk
    BLOCK_K: tl.constexpr,
):
    """(int64 [BLOCK_K] rows, bool [BLOCK_K] filled) of the slots from `start` on; read only filled rows."""
    slot = start + tl.arange(0, BLOCK_K)
    row = tl.load(rows_of + slot.to(tl.int64) * stride, mask=slot < budget, other=-1)
    return row.to(tl.int64), (row >= 0) & (row < key_length)


@triton.jit
def load_rows(
    start,  # first element of a [T, D]
    row,  # int64 [BLOCK]
    valid,  # bool [BLOCK]
    stride_row,
    stride_column,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """[BLOCK, BLOCK_DIM] in the tensor's dtype: the rows, 0 where not valid and past DIM."""
    column = tl.arange(0, BLOCK_DIM)
    place = start + row[:, None] * stride_row + (column.to(tl.int64) * stride_column)[None, :]
    return tl.load(place, mask=valid[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def multiply_rows(
    left,  # [M, BLOCK_DIM]
    start,  # first element of a [T, D]
    row,  # int64 [K]
    valid,  # bool [K]
    stride_row,
    stride_column,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """(the rows [K, BLOCK_DIM], their products with each of `left` float32 [M, K])."""
    rows = load_rows(start, row, valid, stride_row, stride_column, DIM, BLOCK_DIM)
    return rows, dot(left, tl.trans(rows), tl.zeros((M, K), tl.float32))


def vector_configs(dim: int, value_dim: int, elements: int) -> list[dict[str, int]]:
    """Block sizes of `_vector` and of the backward's: so many elements of each operand, 8 to 32 per thread.

    The others: half as many with half the threads, and twice as many with and without twice the threads.
    """
    widest = triton.next_power_of_2(max(dim, value_dim))
    some = ((elements, 4), (elements // 2, 2), (2 * elements, 8), (2 * elements, 4))
    return distinct(
        [
            {"BLOCK_K": min(64, max(8, size // widest)), "num_warps": warps, "num_stages": 2}
            for size, warps in some
        ]
    )
