"""`indexed_attention`: `topk_attention` with the selection of `indexed_select`, the same bits.

The scores that the selection hands over are those that tiles make, so their softmax is that of `topk_attention`.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .gathered_attention import gathered_attention
from .indexed_select import select_indexed
from .topk_attention import LARGEST_BUDGET, weigh_values


def indexed_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: PackedRule,
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq], int32 [B, G, Tq, K]
    fused = rule.groups == query.shape[1] and min(top_k, key.shape[2]) <= LARGEST_BUDGET
    indices, scores = select_indexed(query, key, top_k, rule, codes, bounds, shift, fused)
    if not fused:
        scoring = rule.scale, rule.softcap, rule.sink_logits
        return *gathered_attention(query, key, value, indices, *scoring), indices
    return *weigh_values(value, indices, scores, rule, query.dtype), indices
