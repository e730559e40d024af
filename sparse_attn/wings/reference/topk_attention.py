"""Definition of `topk_attention`, also with a key index: select, then attend; the two stages meet only at `indices`."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.gathered_attention import gathered_attention
from sparse_attn.wings.reference.indexed_select import indexed_select
from sparse_attn.wings.reference.topk_select import topk_select
from sparse_attn.wings.reference.wing import implements


@implements
def topk_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse [B, Hq, Tq], indices int32 [B, G, Tq, K]
    indices = topk_select(query, key, top_k, rule, False, None, 1, 1)
    out, lse = gathered_attention(query, key, value, indices, rule.scale, rule.softcap, rule.sink_logits)
    return out, lse, indices


@implements
def indexed_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: PackedRule,
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse [B, Hq, Tq], indices int32 [B, G, Tq, K]
    indices = indexed_select(query, key, top_k, rule, codes, bounds, shift)
    out, lse = gathered_attention(query, key, value, indices, rule.scale, rule.softcap, rule.sink_logits)
    return out, lse, indices
