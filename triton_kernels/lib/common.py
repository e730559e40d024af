"""What the kernels of several ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import INTERPRETED

LOG2E = 1.4426950408889634  # on the host
LOG2_OF_E = tl.constexpr(LOG2E)  # in kernels
LN2 = tl.constexpr(0.6931471805599453)

# CUDA and HIP take 2^31 − 1 programs along the first axis of a grid and 65535 along the others.
_SECOND_AXIS = 32768


def grid_of(rows: int, outer: int) -> tuple[int, int, int]:
    """A grid of `rows` programs for each of `outer`, which `outer_program` reads back."""
    second = min(outer, _SECOND_AXIS)
    return rows, second, triton.cdiv(outer, second)


@triton.jit
def outer_program():
    """Which of the `outer` of `grid_of` this program serves; at and past `outer` there is nothing to do."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def rounded(
    x,  # float32
    dtype: tl.constexpr,
):
    """x in `dtype`, rounded to nearest even: Triton's interpreter cuts bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(dtype)


def near_rows(
    x: Tensor,  # [rows, columns]
) -> Tensor:
    """x such that offsets within a row fit 32 bits, as kernels of the variable-width ops take them.

    Only a transposed matrix of more than 2^31 elements is copied.
    """
    return x if x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)
