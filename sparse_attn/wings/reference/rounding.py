"""Rows rounded to 8 bits, each by a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers of [−127, 127], scale [..., 1]) with rows [..., D] ≈ numbers · scale, in float32 or float64.

    The scale of a row that holds NaN or an infinity is NaN.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / 127.0, torch.nan)
    numbers = torch.where(scale > 0, (rows / scale).round().clamp(-127.0, 127.0), 0.0)
    return numbers, scale
