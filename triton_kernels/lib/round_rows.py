"""Rows rounded to 8 bits, each by a scale of its own: bit for bit those of the reference's `rounded`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import grid_of, outer_program


@triton.jit(do_not_specialize=["programs", "length"])
def round_rows(
    codes,  # int8 [B, H, T, PITCH], contiguous
    scales,  # float32 [B, H, T], contiguous
    rows,  # [B, H, T, D]
    rows_b,
    rows_h,
    rows_t,
    rows_d,
    programs,  # B · H
    heads,
    length,
    DIM: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The scale of a row that holds NaN or an infinity is NaN, its numbers are 0."""
    program = outer_program().to(tl.int64)
    if program >= programs:
        return
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_DIM)
    rows += program // heads * rows_b + program % heads * rows_h
    there = (t < length)[:, None]
    x = tl.load(
        rows + t[:, None] * rows_t + column.to(tl.int64)[None, :] * rows_d,
        mask=there & (column < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    size = tl.abs(x)
    broken = tl.max(tl.where(size < float("inf"), 0, 1), axis=1) > 0
    scale = tl.where(
        broken, float("nan"), tl.div_rn(tl.max(size, axis=1), tl.full((BLOCK_T,), 127.0, tl.float32))
    )
    useful = (scale > 0.0)[:, None]
    number = tl.div_rn(tl.where(useful, x, 0.0), tl.where(useful, scale[:, None], 1.0) + tl.zeros_like(x))
    number = (number + 12582912.0) - 12582912.0  # 1.5 · 2^23: to the nearest whole number, ties to even
    number = tl.minimum(tl.maximum(number, -127.0), 127.0)
    at = program * length + t
    tl.store(
        codes + at[:, None] * PITCH + column[None, :],
        number.to(tl.int8),
        mask=there & (column < PITCH)[None, :],
    )
    tl.store(scales + at, scale, mask=t < length)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B, H, T, D] → (int8 [B, H, T, D] whose rows begin on 16 bytes, scales float32 [B, H, T])."""
    batch, heads, length, dim = rows.shape
    pitch = triton.cdiv(dim, 16) * 16
    codes = rows.new_empty((batch, heads, length, pitch), dtype=torch.int8)
    scales = rows.new_empty((batch, heads, length), dtype=torch.float32)
    if codes.numel():
        width = triton.next_power_of_2(pitch)
        tile = max(1, 2048 // width)
        round_rows[grid_of(triton.cdiv(length, tile), batch * heads)](
            codes, scales, rows, *rows.stride(), batch * heads, heads, length, DIM=dim, PITCH=pitch,
            BLOCK_DIM=width, BLOCK_T=tile, num_warps=4,
        )  # fmt: skip
    return codes[..., :dim], scales
