"""Sums of rows that share a key, in the order of sorted keys, without atomics: each run of equal keys becomes one row.

A program takes TILE places and adds them one after another. What a tile holds of a run that crosses its borders is left
as a partial sum, and a second kernel adds the partials of a run, tile after tile: so a key that every place has is
divided among all programs, and every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32  # places of one program


def power_of_2(size: int, least: int, most: int) -> int:
    """The power of two that holds `size`, within limits."""
    return min(most, max(least, triton.next_power_of_2(size)))


@triton.jit
def _value(
    values,  # [N, width]
    order,  # int64 [N]
    place,
    last,
    columns,  # [BLOCK_W]
    width,
    value_row,
    value_column,
    PERMUTED: tl.constexpr,
):
    """float32 [BLOCK_W]: what the place adds to its row."""
    inside = place < last
    if PERMUTED:
        place = tl.load(order + place, mask=inside, other=0)
    shown = tl.where(inside, width, 0)  # a scalar mask does not broadcast in every version of the interpreter
    value = tl.load(values + place * value_row + columns * value_column, mask=columns < shown, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _add(
    total,  # float32 [BLOCK_W]: of the run so far
    is_front,  # the run began before this tile
    value,  # float32 [BLOCK_W]
    place,
    end,  # of the tile
    last,  # of the band
    columns,  # [BLOCK_W]
    keys,  # int [N]
    grad,  # [rows, width]
    partial,  # float32 [tiles, 2, width]
    tile,
    first_key,
    rows,
    width,
):
    """Adds one place and, at the end of its run in this tile, writes the sum; (total, is_front) of what follows."""
    inside = place < end
    key = tl.load(keys + place, mask=inside, other=-1)
    following = tl.load(keys + place + 1, mask=inside & (place + 1 < last), other=-1)
    total += value
    ends = following != key
    if inside & (ends | (place + 1 == end)):
        if ends & (is_front == 0):
            row = key.to(tl.int64) - first_key
            tl.store(
                grad + row * width + columns,
                total.to(grad.dtype.element_ty),
                mask=columns < tl.where(row < rows, width, 0),
            )
        else:
            # The first run of a tile may have begun before it, and only the last one may go on after it.
            slot = tile * 2 + (1 - is_front)
            tl.store(partial + slot * width + columns, total, mask=columns < width)
    done = inside & ends
    return tl.where(done, 0.0, total), tl.where(done, 0, is_front)


@triton.jit(do_not_specialize=["band", "first_key", "rows"])
def sum_runs_kernel(
    grad,  # [rows, width], zeros where no position has the row
    partial,  # float32 [tiles, 2, width]: of a run begun before the tile, and of one that goes on after it
    values,  # [N, width]
    order,  # int64 [N]: the place in `values` of each place in sorted order, if PERMUTED
    keys,  # int [N], ascending
    bounds,  # int64 [B + 1]
    band,
    first_key,  # the key of the table's first row
    rows,
    width,
    value_row,  # strides
    value_column,
    PERMUTED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + band)
    last = tl.load(bounds + band + 1)
    begin = tl.maximum(first, tile * TILE)
    end = tl.minimum(last, tile * TILE + TILE)
    if begin < end:
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        total = tl.zeros((BLOCK_W,), dtype=tl.float32)
        before = tl.load(keys + begin - 1, mask=begin > first, other=-1)
        is_front = (before == tl.load(keys + begin)).to(tl.int32)
        for step in range(0, TILE, 4):  # four loads under way before the first is used
            place = begin + step
            v0 = _value(values, order, place, end, columns, width, value_row, value_column, PERMUTED)
            v1 = _value(values, order, place + 1, end, columns, width, value_row, value_column, PERMUTED)
            v2 = _value(values, order, place + 2, end, columns, width, value_row, value_column, PERMUTED)
            v3 = _value(values, order, place + 3, end, columns, width, value_row, value_column, PERMUTED)
            total, is_front = _add(
                total,
                is_front,
                v0,
                place,
                end,
                last,
                columns,
                keys,
                grad,
                partial,
                tile,
                first_key,
                rows,
                width,
            )
            total, is_front = _add(
                total,
                is_front,
                v1,
                place + 1,
                end,
                last,
                columns,
                keys,
                grad,
                partial,
                tile,
                first_key,
                rows,
                width,
            )
            total, is_front = _add(
                total,
                is_front,
                v2,
                place + 2,
                end,
                last,
                columns,
                keys,
                grad,
                partial,
                tile,
                first_key,
                rows,
                width,
            )
            total, is_front = _add(
                total,
                is_front,
                v3,
                place + 3,
                end,
                last,
                columns,
                keys,
                grad,
                partial,
                tile,
                first_key,
                rows,
                width,
            )


@triton.jit(do_not_specialize=["band", "first_key", "rows"])
def join_runs_kernel(
    grad,  # [rows, width]
    partial,  # float32 [tiles, 2, width]
    keys,  # int [N], ascending
    bounds,  # int64 [B + 1]
    band,
    first_key,
    rows,
    width,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Each run that crosses the borders of tiles, summed by the program of the tile that it begins in."""
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + band)
    last = tl.load(bounds + band + 1)
    begin = tl.maximum(first, tile * TILE)
    end = tile * TILE + TILE
    if (begin < end) & (end < last):
        key = tl.load(keys + end - 1)
        before = tl.load(keys + begin - 1, mask=begin > first, other=-1)
        if (key == tl.load(keys + end)) & (key != before):
            columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
            some = tl.arange(0, BLOCK_T)
            total = tl.load(partial + (tile * 2 + 1) * width + columns, mask=columns < width, other=0.0)
            following = tile + 1
            goes_on = 1
            while goes_on > 0:
                tiles = following + some
                inside = tiles * TILE < last
                same = tl.load(keys + tiles * TILE, mask=inside, other=-1) == key
                block = tl.load(
                    partial + tiles[:, None] * (2 * width) + columns[None, :],
                    mask=same[:, None] & (columns < width)[None, :],
                    other=0.0,
                )
                total += tl.sum(block, axis=0)
                goes_on = tl.min(same.to(tl.int32), axis=0)
                following += BLOCK_T
            row = key.to(tl.int64) - first_key
            tl.store(
                grad + row * width + columns,
                total.to(grad.dtype.element_ty),
                mask=columns < tl.where(row < rows, width, 0),
            )


def sum_runs(
    grad: Tensor,  # [rows, width]
    values: Tensor,  # [N, width]
    keys: Tensor,  # int [N]
    first_key: int,
    band: int,
    order: Tensor,  # int64 [N]
    bounds: Tensor,  # int64 [B + 1]
    permuted: bool,
) -> None:
    """Writes the sums of the runs of one band, whose places are bounds[band] to bounds[band + 1], into their rows."""
    rows, width = grad.shape
    tiles = triton.cdiv(keys.shape[0], TILE)
    partial = torch.empty((tiles, 2, width), dtype=torch.float32, device=grad.device)
    block_w = power_of_2(width, 16, 512)
    grid = (tiles, triton.cdiv(width, block_w))
    warps = max(1, block_w // 64)
    sum_runs_kernel[grid](
        grad,
        partial,
        values,
        order,
        keys,
        bounds,
        band,
        first_key,
        rows,
        width,
        values.stride(0),
        values.stride(1),
        PERMUTED=permuted,
        TILE=TILE,
        BLOCK_W=block_w,
        num_warps=warps,
    )
    if tiles == 1:
        return
    block_w = power_of_2(width, 16, 128)
    join_runs_kernel[(tiles, triton.cdiv(width, block_w))](
        grad, partial, keys, bounds, band, first_key, rows, width,
        TILE=TILE, BLOCK_T=32, BLOCK_W=block_w, num_warps=max(1, block_w // 32),
    )  # fmt: skip
