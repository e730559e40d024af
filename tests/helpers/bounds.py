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


def bounds_of(query: Tensor, key: Tensor, norm: float) -> Bounds:
    """query [..., Tq, D], key [..., Tk, D], rounded to whole numbers up to this norm, and their products to units."""
    query, key = query.double(), key.double()
    q, k = rotate(query), rotate(key - key.mean(-2, keepdim=True))
    q_scale = q.norm(dim=-1, keepdim=True) / norm  # of each query
    k_scale = 2 ** (k.norm(dim=-1).amax(-1)[..., None, None] / norm).log2().ceil()  # of all keys
    q_rounded, k_rounded = (q / q_scale).round() * q_scale, (k / k_scale).round() * k_scale
    unit = q_scale * k_scale * 2.0 ** math.ceil(math.log2(norm**2 / 2**15))
    score = (q_rounded @ k_rounded.mT / unit).floor() * unit
    error = lambda a, b: (a - b).norm(dim=-1)  # noqa: E731
    # Of the float32 sum of the exact score: as in slack_of().
    slack = (query.shape[-1] + 64) * 2.0**-23 * query.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :]
    margin = error(q, q_rounded)[..., None] * k.norm(dim=-1)[..., None, :]
    margin = margin + q_rounded.norm(dim=-1)[..., None] * error(k, k_rounded)[..., None, :] + slack
    return Bounds(score - margin, score + unit + margin)


def survivors(bounds: Bounds, top_k: int) -> Tensor:
    """bool [..., Tq, Tk]: not beaten by the K-th best lower bound."""
    return bounds.upper >= bounds.lower.topk(top_k, -1).values[..., -1:]
