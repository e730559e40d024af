"""`quantized_select`: topk_select on scores of queries and keys that are rounded to 8 bits."""

from __future__ import annotations

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, selection, sizes_of
from sparse_attn.ops.registry import define
from sparse_attn.ops.topk_select import SELECTION_SCHEMA, fake
from sparse_attn.wings.base import choose, overload

define("quantized_select", f"(Tensor query, Tensor key, {SELECTION_SCHEMA}) -> Tensor", fake)


def quantized_select(
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
    r"""Selects as :func:`topk_select` does, by scores of queries and keys that are rounded to 8 bits.

    Each row x of `query` and of `key` becomes whole numbers times its scale:

    .. math:: s = \max_d |x_d| / 127, \qquad \hat x_d = s \cdot \mathrm{round}(x_d / s)

    and keys are ranked by :math:`\hat q \cdot \hat k`. Nothing has to be trained or fitted. On CPUs that multiply
    bytes (AVX-512 VNNI) the scores cost a quarter of float32's; elsewhere they cost the same.

    Args and Returns: those of :func:`topk_select`. A row that holds NaN or an infinity has only NaN scores, which
    rank first.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: row-wise ("vector-wise") scales are Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale" (2022).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> indices = sparse_attn.quantized_select(q, k, 8, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 2, 64, 16])
    """
    query, key = autocast(query, key)
    checks.query_key(query, key)
    arguments = selection(
        query, key, top_k, is_causal, causal_offset, attn_mask, key_lengths, scale, window, sinks, share
    )
    wing = choose("quantized_select", query, backend, **sizes_of(query))
    return overload("quantized_select", wing)(query, key, *arguments)
