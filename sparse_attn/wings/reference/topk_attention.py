"""Definition of `topk_attention`: select, then attend; the two stages meet only at `indices`."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.wings.reference.gathered_attention import gathered_attention
from sparse_attn.wings.reference.topk_select import topk_select


def topk_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    attn_mask: Tensor | None,  # bool [B, G, Tq, Tk]
    key_lengths: Tensor | None,  # int [B]
    top_k: int,
    is_causal: bool,
    causal_offset: int,
    scale: float,
    window: int,
    sinks: int,
    groups: int,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq], indices int32 [B, G, Tq, K]
    indices = topk_select(
        query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, scale, window, sinks, groups
    )
    out, lse = gathered_attention(query, key, value, indices, scale)
    return out, lse, indices
