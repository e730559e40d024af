"""`index_keys`: rows of a key index from keys, written in place; a key at a time where a cache grows by one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .lib.common import grid_of, outer_program
from .lib.key_bounds import BLOCK, WORD, to_whole


@triton.jit(do_not_specialize=["programs", "length", "begin", "blocks"])
def write_rows(
    key,  # [B, Hkv, T, D]
    codes,  # int8 [B, Hkv, N, words, 16, 4]
    bounds,  # float32 [B, Hkv, N, 3, 16]
    shift,  # float32 [B, Hkv, D], contiguous
    key_b,
    key_h,
    key_t,
    key_d,
    codes_b,
    codes_h,
    bounds_b,
    bounds_h,
    programs,  # B · Hkv
    heads,
    length,  # T
    begin,  # place of the first key
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """As wings/reference/index_keys.py has it: a scale, and no less than the norms of what rounding changed and of the
    key less its shift; an infinite one lets a key pass every bound.
    """
    program = outer_program().to(tl.int64)
    if program >= programs:
        return
    b, head = program // heads, program % heads
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    inside = column < DIM
    there = t < length
    x = tl.load(
        key + b * key_b + head * key_h + t[:, None] * key_t + column.to(tl.int64)[None, :] * key_d,
        mask=there[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    middle = tl.load(shift + program * DIM + column, mask=inside, other=0.0)
    x = tl.where(inside[None, :], x - middle[None, :], 0.0)
    norm = tl.sqrt(tl.sum(x * x, 1))
    useful = norm < 1e18  # products with larger keys could leave float32
    x = tl.where(useful[:, None], x, 0.0)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.div_rn(largest, tl.full((BLOCK_T,), 127.0, tl.float32))
    step = scale[:, None] + tl.zeros_like(x)
    # A scale of 0 has rows of next to nothing, which take no part in a product.
    number = to_whole(tl.where(step > 0.0, tl.div_rn(x, tl.where(step > 0.0, step, 1.0)), 0.0))
    rest = x - number * step
    # What the arithmetic can have lost: of each component a few units, of each sum of squares D of them, and all of it
    # where squares vanish.
    UNIT: tl.constexpr = 2.0**-23
    MORE: tl.constexpr = 1.0 + 2 * DIM * 2.0**-23 + 1e-6
    at_most = largest * (DIM**0.5 * MORE)
    tiny = largest < 1e-10
    error = tl.where(tiny, at_most, (tl.sqrt(tl.sum(rest * rest, 1)) + 4 * UNIT * norm) * MORE)
    norm = tl.where(useful, tl.where(tiny, at_most, norm * MORE), float("inf"))
    place = begin + t
    block, lane = place // BLOCK, place % BLOCK
    rows = codes + b * codes_b + head * codes_h + block * (WORDS * BLOCK * WORD) + lane * WORD
    tl.store(
        rows[:, None] + (column // WORD * (BLOCK * WORD) + column % WORD)[None, :],
        number.to(tl.int8),
        mask=there[:, None] & (column < WORDS * WORD)[None, :],
    )
    three = bounds + b * bounds_b + head * bounds_h + block * (3 * BLOCK) + lane
    tl.store(three, scale, mask=there)
    tl.store(three + BLOCK, error, mask=there)
    tl.store(three + 2 * BLOCK, norm, mask=there)


def index_keys(
    key: Tensor,  # [B, Hkv, T, D]
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
    begin: int,  # place of the first key
) -> None:
    batch, heads, length, dim = key.shape
    if key.numel() == 0:
        return
    if not (codes[0, 0].is_contiguous() and bounds[0, 0].is_contiguous()):
        raise ValueError("codes and bounds must have the rows of a head side by side")
    words = codes.shape[3]
    width = triton.next_power_of_2(words * 4)
    tile = min(max(1, 2048 // width), triton.next_power_of_2(length))
    write_rows[grid_of(triton.cdiv(length, tile), batch * heads)](
        key, codes, bounds, shift.contiguous(), *key.stride(), *codes.stride()[:2], *bounds.stride()[:2], batch * heads,
        heads, length, begin, DIM=dim, WORDS=words, BLOCK_D=width, BLOCK_T=tile, num_warps=4 if tile > 1 else 1,
    )  # fmt: skip
