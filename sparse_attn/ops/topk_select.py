"""`topk_select`: for each query the keys of the largest scores, as indices."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, selection, sizes_of
from sparse_attn.ops.registry import define
from sparse_attn.wings.base import choose, overload

# SymInt, so that under torch.compile an offset made of sizes (a KV cache that grows) needs no new graph per size.
SELECTION_SCHEMA = (
    "Tensor? attn_mask, Tensor? key_lengths, SymInt top_k, bool is_causal, SymInt causal_offset, "
    "float scale, SymInt window, SymInt sinks, SymInt groups"
)


def fake(
    query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, scale, window, sinks, groups
) -> Tensor:
    budget = torch.sym_min(top_k, key.shape[2])
    return query.new_empty((query.shape[0], groups, query.shape[2], budget), dtype=torch.int32)


define("topk_select", f"(Tensor query, Tensor key, {SELECTION_SCHEMA}) -> Tensor", fake)


def topk_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    backend: str | None = None,
) -> Tensor:
    r"""Selects for each query the `top_k` keys of the largest :math:`q \cdot k`, exactly, without a [Tq, Tk] matrix.

    With ``share="kv"`` or ``"all"`` the query heads that share get one selection: a key's rank is its attention
    mass, the softmax probability over all visible keys summed over the sharing heads,
    :math:`\sum_h \exp(s_{hj} - \mathrm{LSE}_h)`. Nothing is differentiated.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv (GQA, MQA).
        top_k: keys per query, the whole budget (window and sinks count toward it), at least 1.
        is_causal: query i sees keys 0 … i + causal_offset.
        causal_offset: offset of the diagonal; must be given when Tq ≠ Tk (Tk − Tq: the queries are the last).
        attn_mask: boolean, True = may attend, broadcastable to [B, Hq, Tq, Tk]; the same for heads that share.
        key_lengths: int32 or int64 [B]; keys at and past it do not exist.
        scale: factor of q·k, default 1/√D.
        window: always keep the last `window` visible positions up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        int32 [B, G, Tq, min(top_k, Tk)], G = Hq, Hkv or 1 by `share`: unique, ascending, empty slots −1 at the
        end. Ties go to the smaller key index. A query with fewer visible keys than top_k keeps them all.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Sources: exact top-k attention is Gupta et al., "Memory-efficient Transformers via Top-k Attention" (2021);
    always-kept first keys ("sinks") are Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (2023).

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(1, 8, 128, 64), torch.randn(1, 2, 128, 64)
        >>> sparse_attn.topk_select(q, k, 16, is_causal=True, share="kv").shape
        torch.Size([1, 2, 128, 16])
    """
    query, key = autocast(query, key)
    checks.query_key(query, key)
    arguments = selection(
        query, key, top_k, is_causal, causal_offset, attn_mask, key_lengths, scale, window, sinks, share
    )
    wing = choose("topk_select", query, backend, **sizes_of(query))
    return overload("topk_select", wing)(query, key, *arguments)
