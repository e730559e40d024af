"""The bounds of csrc/cpu/kernels/lib/bounds.h in plain PyTorch and float64: what the rounding of rows can change."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    lower: Tensor  # float64 [..., Tq, Tk], of q·k up to the same constant for all keys of a query
    upper: Tensor


def rotate(rows: Tensor) -> Tensor:
    """Orthonormal Hadamard transforms of the components, in blocks of powers of two."""
    blocks = []
    while rows.shape[-1] > 0:
        size = 2 ** int(math.log2(rows.shape[-1]))
        block, rows = rows[..., :size], rows[..., size:]
        matrix = torch.ones(1, 1, dtype=rows.dtype)
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
        blocks.append(block @ matrix / math.sqrt(size))
    return torch.cat(blocks, -1)


def rounded(rows: Tensor, most: int) -> Tensor:
    """Each row as whole numbers of [−most, most] times its largest component / most."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
    return (rows / scale).round() * scale


def bounds_of(query: Tensor, key: Tensor, bits: int) -> Bounds:
    """query [..., Tq, D], key [..., Tk, D], both rounded to `bits` bits (sign included)."""
    most = 2 ** (bits - 1) - 1
    query, key = query.double(), key.double()
    q, k = rotate(query), rotate(key - key.mean(-2, keepdim=True))
    q_rounded, k_rounded = rounded(q, most), rounded(k, most)
    score = q_rounded @ k_rounded.mT
    error = lambda a, b: (a - b).norm(dim=-1)  # noqa: E731
    # Of the float32 sum of the exact score: as in slack_of().
    slack = (query.shape[-1] + 64) * 2.0**-23 * query.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :]
    margin = error(q, q_rounded)[..., None] * k.norm(dim=-1)[..., None, :]
    margin = margin + q_rounded.norm(dim=-1)[..., None] * error(k, k_rounded)[..., None, :] + slack
    return Bounds(score - margin, score + margin)


def survivors(bounds: Bounds, top_k: int) -> Tensor:
    """bool [..., Tq, Tk]: not beaten by the K-th best lower bound."""
    return bounds.upper >= bounds.lower.topk(top_k, -1).values[..., -1:]
