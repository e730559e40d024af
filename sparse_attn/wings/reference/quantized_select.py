"""Definition of `quantized_select`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.topk_select import products, select


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers of [−127, 127], scale [..., 1]) with rows [..., D] ≈ numbers · scale, in float32 or float64.

    The scale of a row that holds NaN or an infinity is NaN.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / 127.0, torch.nan)
    numbers = torch.where(scale > 0, (rows / scale).round().clamp(-127.0, 127.0), 0.0)
    return numbers, scale


def quantized_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    attn_mask: Tensor | None,  # bool [B, G, Tq, Tk], True = may attend
    key_lengths: Tensor | None,  # int [B]
    top_k: int,
    is_causal: bool,
    causal_offset: int,
    scale: float,
    window: int,
    sinks: int,
    groups: int,  # G: 1, Hkv or Hq
) -> Tensor:  # int32 [B, G, Tq, K]
    keys, key_scale = rounded(key)
    key_scale = key_scale.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT  # [B, Hq, 1, Tk]

    def scores(rows: slice) -> Tensor:
        queries, query_scale = rounded(query[:, :, rows])
        return products(queries, keys) * key_scale * query_scale * scale

    return select(
        scores, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, window, sinks, groups
    )
