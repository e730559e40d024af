"""`indexer_select`: for each query the keys that a small learned scorer ranks highest, as indices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Op
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import PackedRule, Rule, selection_shape


def fake(query, key, weights, top_k, rule: PackedRule, int8) -> Tensor:
    return query.new_empty(selection_shape(query, key, top_k, rule), dtype=torch.int32)


OP = Op(
    "indexer_select",
    f"(Tensor query, Tensor key, Tensor weights, SymInt top_k, {rules.SCHEMA}, bool int8) -> Tensor",
    fake,
    batch="query key weights out",
)


@shardable("query:BHTD key:BHSD weights:BHT rule", "BGTK")
def select(
    query: Tensor,  # [B, G·Hi, Tq, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # [B, G·Hi, Tq]
    top_k: int,
    rule: Rule,
    *,
    int8: bool = False,
    backend: str | None = None,
    function: str | None = None,
) -> Tensor:  # int32 [B, G, Tq, K]
    """`indexer_select` by a rule, of which `share` and what it says of scores say nothing here."""
    query, key = autocast(query, key)
    checks.query_key(query, key)
    weights = checks.indexer_weights(weights, query)
    top_k = checks.top_k_of(top_k)
    if rule.softcap is not None or rule.sink_logits is not None:
        rule = replace(rule, softcap=None, sink_logits=None)  # of the attention's heads, not of these
    packed = rule.packed(query, key, top_k, per_group=True)
    int8 = checks.boolean("int8", int8)
    wing = OP.choose(query, backend, rule=rule, function=function, sizes=sizes_of(query))
    return OP.on(wing)(query, key, weights, top_k, *packed.parts(), int8)


def indexer_select(
    query: Tensor,  # [B, G·Hi, Tq, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # [B, G·Hi, Tq]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: int = 0,
    sinks: int = 0,
    int8: bool = False,
    key_starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Selects for each query the `top_k` keys of the largest indexer score, without a [Tq, Tk] matrix.

    An indexer is a few narrow heads beside the attention, with queries and keys of its own:

    .. math:: \mathrm{score}_{ij} = \sum_{h=1}^{H_i} w_{hi}\, \max(0,\; q_{hi} \cdot k_j)

    Its G groups select for themselves: with G = 1 all attention heads share the selection, with G = Hkv each
    key/value head has its own. The result goes into :func:`gathered_attention` as it is. Nothing is
    differentiated; :func:`indexer_loss` trains the scores.

    Args:
        query: [B, G·Hi, Tq, D], float32, float16, bfloat16 or float64, any strides; the Hi heads of a group
            stand next to each other.
        key: [B, G, Tk, D], same dtype and device: one key head per group.
        weights: [B, G·Hi, Tq], any float dtype: the weight of each head for each query. Negative ones count as
            they are.
        top_k: keys per query, the whole budget (window and sinks count toward it), at least 1.
        is_causal, causal_offset, key_lengths, window, sinks, key_starts, backend: as in :func:`topk_select`.
        attn_mask: boolean, True = may attend, broadcastable to [B, G, Tq, Tk].
        int8: score from queries and keys rounded to 8 bits, each row by its own scale as in
            :func:`quantized_select`: faster on CPUs that multiply bytes.

    Returns:
        int32 [B, G, Tq, min(top_k, Tk)]: unique, ascending, empty slots −1 at the end. Ties go to the smaller key
        index. A query with fewer visible keys than top_k keeps them all.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: the lightning indexer of DeepSeek-AI, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with
    DeepSeek Sparse Attention" (2025).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, w = torch.randn(1, 4, 128, 32), torch.randn(1, 1, 128, 32), torch.randn(1, 4, 128)
        >>> sparse_attn.indexer_select(q, k, w, 16, is_causal=True, window=4, sinks=1).shape
        torch.Size([1, 1, 128, 16])
    """
    rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, window, sinks, key_starts=key_starts)
    return select(query, key, weights, top_k, rule, int8=int8, backend=backend)
