"""Definition of `indexer_select`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule, selection_shape
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.rounding import rounded
from sparse_attn.wings.reference.rule import VisibleKeys, best_of
from sparse_attn.wings.reference.wing import implements


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


@implements
def indexer_select(
    query: Tensor,  # [B, G·Hi, Tq, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # [B, G·Hi, Tq], float32 or float64
    top_k: int,
    rule: PackedRule,  # what it says of scores plays no part
    int8: bool,
) -> Tensor:  # int32 [B, G, Tq, K]
    batch, heads, query_length = query.shape[:3]
    shape = selection_shape(query, key, top_k, rule)
    indices = query.new_empty(shape, dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    keys, key_scale = rounded(key) if int8 else (key.to(weights.dtype), None)
    visible = VisibleKeys(key, rule)
    for rows in query_chunks(query_length, batch * heads * key.shape[2]):
        queries, weight = query[:, :, rows].to(weights.dtype), weights[:, :, rows]
        if int8:
            queries, query_scale = rounded(queries)
            weight = weight * query_scale.squeeze(-1)
        scores = indexer_scores(queries, keys, weight)
        if key_scale is not None:
            scores = scores * key_scale.mT
        indices[:, :, rows] = best_of(scores, *visible.of(rows), shape[3])
    return indices
