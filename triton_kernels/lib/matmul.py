"""Products of matrices with float32 sums that no global switch rounds: TF32 and reduced-precision sums stay out.

bfloat16 goes to the vendor's library. float32 has no exact tensor cores anyway, and float16 results would overflow
there before they can be scaled: both take the kernel below. Few tiles and a long sum are divided into splits, which are
added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.wings.settings import BFLOAT16_SUMS

from .dot import dot

PROGRAMS = 264  # enough for two on each multiprocessor of a large GPU


@triton.jit(do_not_specialize=["rows", "inner_per_split"])
def matmul_kernel(
    out,  # float32 [splits, rows, columns]
    a,  # [rows, inner]
    b,  # [inner, columns]
    rows,
    columns,
    inner,
    inner_per_split,
    a_row,  # strides
    a_column,
    b_row,
    b_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    begin = split * inner_per_split
    end = tl.minimum(inner, begin + inner_per_split)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = tl.load(
            a + m[:, None] * a_row + k[None, :] * a_column,
            mask=(m < rows)[:, None] & (k < end)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * b_row + n[None, :] * b_column,
            mask=(k < end)[:, None] & (n < columns)[None, :],
            other=0.0,
        )
        total = dot(left, right, total)
    tl.store(
        out + (split * rows + m[:, None]) * columns + n[None, :],
        total,
        mask=(m < rows)[:, None] & (n < columns)[None, :],
    )


def config(dtype: torch.dtype, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps)"""
    if dtype == torch.float32:
        return 64, 64 if columns > 32 else 32, 16, 4
    return 128 if rows > 64 else 64, 64 if columns > 32 else 32, 32, 4


def product(
    a: Tensor,  # [M, K]
    b: Tensor,  # [K, N], of a's dtype
) -> Tensor:  # [M, N]: bfloat16 for bfloat16, else float32
    if a.dtype == torch.bfloat16:
        with BFLOAT16_SUMS.off():
            return torch.mm(a, b)
    (rows, inner), columns = a.shape, b.shape[1]
    block_m, block_n, block_k, warps = config(a.dtype, rows, columns)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    splits = max(1, min(PROGRAMS // tiles, triton.cdiv(inner, 16 * block_k)))
    share = triton.cdiv(triton.cdiv(inner, splits), block_k) * block_k
    out = torch.empty((splits, rows, columns), dtype=torch.float32, device=a.device)
    matmul_kernel[(tiles, splits)](
        out, a, b, rows, columns, inner, share, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
