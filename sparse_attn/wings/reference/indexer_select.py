"""Definition of `indexer_select`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.quantized_select import rounded
from sparse_attn.wings.reference.topk_select import Visibility, best_of


def indexer_scores(
    query: Tensor,  # [B, G·Hi, t, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # [B, G·Hi, t]
) -> Tensor:  # [B, G, t, Tk]
    """Σ_h w_h · max(0, q_h · k): all of them, differentiable."""
    groups = key.shape[1]
    query = query.unflatten(1, (groups, -1))  # [B, G, Hi, t, D]
    products = (query @ key.unsqueeze(2).transpose(-1, -2)).relu()  # [B, G, Hi, t, Tk]
    return (products * weights.unflatten(1, (groups, -1)).unsqueeze(-1)).sum(2)


def indexer_select(
    query: Tensor,  # [B, G·Hi, Tq, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # [B, G·Hi, Tq], float32 or float64
    attn_mask: Tensor | None,  # bool [B, G, Tq, Tk], True = may attend
    key_lengths: Tensor | None,  # int [B]
    top_k: int,
    is_causal: bool,
    causal_offset: int,
    window: int,
    sinks: int,
    int8: bool,
) -> Tensor:  # int32 [B, G, Tq, K]
    batch, heads, query_length = query.shape[:3]
    groups, key_length = key.shape[1], key.shape[2]
    budget = min(top_k, key_length)
    indices = query.new_empty((batch, groups, query_length, budget), dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    keys, key_scale = rounded(key) if int8 else (key.to(weights.dtype), None)
    rule = Visibility(key, attn_mask, key_lengths, is_causal, causal_offset, window, sinks, groups)
    for rows in query_chunks(query_length, batch * heads * key_length):
        queries, weight = query[:, :, rows].to(weights.dtype), weights[:, :, rows]
        if int8:
            queries, query_scale = rounded(queries)
            weight = weight * query_scale.squeeze(-1)
        scores = indexer_scores(queries, keys, weight)
        if int8:
            scores = scores * key_scale.mT
        indices[:, :, rows] = best_of(scores, *rule.of(rows), budget)
    return indices
