"""Definition of `topk_select`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule, selection_shape
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.rounding import rounded as rounded_rows
from sparse_attn.wings.reference.rule import VisibleKeys, attention_mass, best_of, capped
from sparse_attn.wings.reference.wing import implements


@implements
def topk_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    rounded: bool,  # scores of queries and keys that are rounded to 8 bits
    blocks: Tensor | None,  # int32 [B, G, N, M]: the keys of these blocks alone
    block_size: int,
    query_tile: int,
) -> Tensor:  # int32 [B, G, Tq, K]
    batch, heads, query_length = query.shape[:3]
    shape = selection_shape(query, key, top_k, rule)
    indices = query.new_empty(shape, dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    scores = _Rounded(query, key) if rounded else _True(query, key)
    keys = VisibleKeys(key, rule, blocks, block_size, query_tile)
    for rows in query_chunks(query_length, batch * heads * key.shape[2]):
        tile = scores.of(rows) * rule.scale
        visible, forced = keys.of(rows)
        if rule.groups < heads:
            tile = capped(tile, rule.softcap).unflatten(1, (rule.groups, heads // rule.groups))
            tile = attention_mass(tile, visible, rule.sink_logits)
        indices[:, :, rows] = best_of(tile, visible, forced, shape[3])
    return indices


class _True:
    """q·k of some queries: [B, Hq, t, Tk]."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key.to(torch.promote_types(query.dtype, torch.float32))

    def of(self, rows: slice) -> Tensor:
        return products(self.query[:, :, rows].to(self.key.dtype), self.key)


class _Rounded:
    """The same of rows that are rounded to 8 bits."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query = query
        self.key, scale = rounded_rows(key)
        self.key_scale = scale.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT  # [B, Hq, 1, Tk]

    def of(self, rows: slice) -> Tensor:
        query, query_scale = rounded_rows(self.query[:, :, rows])
        return products(query, self.key) * self.key_scale * query_scale


def products(query: Tensor, key: Tensor) -> Tensor:
    """q·k: query [B, Hq, t, D], key [B, Hkv, Tk, D] → [B, Hq, t, Tk]."""
    query = query.unflatten(1, (key.shape[1], -1))
    return (query @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
