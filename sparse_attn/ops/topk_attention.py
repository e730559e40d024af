"""`topk_attention`: select and attend in one op, in place of scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, selection, sizes_of
from sparse_attn.ops.gathered_attention import attention_gradients
from sparse_attn.ops.gathered_attention import fake as fake_attention
from sparse_attn.ops.registry import define, differentiate
from sparse_attn.ops.topk_select import SELECTION_SCHEMA
from sparse_attn.ops.topk_select import fake as fake_selection
from sparse_attn.wings.base import choose, overload, reasons


def fake(query, key, value, *selection_arguments) -> tuple[Tensor, Tensor, Tensor]:
    indices = fake_selection(query, key, *selection_arguments)
    return *fake_attention(query, key, value, indices, 1.0), indices


define(
    "topk_attention",
    f"(Tensor query, Tensor key, Tensor value, {SELECTION_SCHEMA}) -> (Tensor out, Tensor lse, Tensor indices)",
    fake,
)

_INPUTS = 12
_SCALE = 8  # position of `scale` among the inputs


def _setup_context(ctx, inputs, output) -> None:
    out, lse, indices = output
    ctx.scale = inputs[_SCALE]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(*inputs[:3], indices, out, lse)
    ctx.set_materialize_grads(False)


def _backward_of(wing: str):
    def backward(ctx, grad_out, grad_lse, _grad_indices):
        if grad_out is None and grad_lse is None:
            return (None,) * _INPUTS
        grads = attention_gradients(wing, ctx.saved_tensors, grad_out, grad_lse, ctx.scale)
        return *grads, *(None,) * (_INPUTS - 3)

    return backward


differentiate("topk_attention", _setup_context, _backward_of)


def topk_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
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
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Attention of each query to its `top_k` best keys alone, in place of scaled_dot_product_attention.

    Selects as :func:`topk_select` does, then attends as :func:`gathered_attention` does:

    .. math:: S_i = \mathrm{topk}_j(q_i \cdot k_j), \qquad
              \mathrm{out}_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j

    No [Tq, Tk] matrix is stored. Differentiable in query, key and value through the selected keys; the choice
    itself is not differentiated. ``top_k >= Tk`` is dense attention.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv (GQA, MQA).
        value: [B, Hkv, Tk, Dv]; Dv may differ from D.
        top_k: keys per query, the whole budget (window and sinks count toward it), at least 1.
        is_causal: query i sees keys 0 … i + causal_offset.
        causal_offset: offset of the diagonal; must be given when Tq ≠ Tk (Tk − Tq: the queries are the last).
        attn_mask: boolean, True = may attend, broadcastable to [B, Hq, Tq, Tk]; the same for heads that share.
        key_lengths: int32 or int64 [B]; keys at and past it do not exist.
        scale: factor of q·k, default 1/√D.
        window: always keep the last `window` visible positions up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        return_lse: also return the log-sum-exp of the attended scores, float32 [B, Hq, Tq] (differentiable).
        return_indices: also return the selection, int32 [B, G, Tq, min(top_k, Tk)].
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses. See :func:`explain`.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with flags the tuple (out, lse, indices) of what was asked for,
        in that order. A query that sees no key has out 0, lse −inf and gradient 0.
        A row with NaN or a score of +inf among its keys is NaN (inf − inf, as the formula has it).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Sources: Gupta et al., "Memory-efficient Transformers via Top-k Attention" (2021); sinks: Xiao et al.,
    "Efficient Streaming Language Models with Attention Sinks" (2023).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 8, 256, 64, requires_grad=True) for _ in range(3))
        >>> out = sparse_attn.topk_attention(q, k, v, top_k=32, is_causal=True, window=8, sinks=4)
        >>> out.sum().backward()
    """
    query, key, value, arguments = _checked(
        query,
        key,
        value,
        top_k,
        is_causal,
        causal_offset,
        attn_mask,
        key_lengths,
        scale,
        window,
        sinks,
        share,
    )
    return_lse = checks.boolean("return_lse", return_lse)
    return_indices = checks.boolean("return_indices", return_indices)
    wing = choose("topk_attention", query, backend, **sizes_of(query, value))
    out, lse, indices = overload("topk_attention", wing)(query, key, value, *arguments)
    if not return_lse and not return_indices:
        return out
    return (out, *((lse,) if return_lse else ()), *((indices,) if return_indices else ()))


def _checked(query, key, value, *selection_arguments):
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    return query, key, value, selection(query, key, *selection_arguments)


@dataclass(frozen=True)
class Explanation:
    """Which wing a call would run on, and for each other wing why not; `print` it."""

    op: str
    backend: str
    reasons: dict[str, str | None]  # None: it could take the call

    def __str__(self) -> str:
        lines = [f"{self.op} runs on the {self.backend!r} wing"]
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {reason or 'it could, but is less preferred'}")
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Says which wing `topk_attention` with these arguments would run on, and why not each other one; runs nothing.

    Takes the arguments of :func:`topk_attention`, and raises what it would raise.

    Example:
        >>> import torch, sparse_attn
        >>> q = torch.randn(1, 2, 8, 16, dtype=torch.float64)
        >>> print(sparse_attn.explain(q, q, q, 4).backend)
        reference
    """
    query, _, value, _ = _checked(
        query,
        key,
        value,
        top_k,
        is_causal,
        causal_offset,
        attn_mask,
        key_lengths,
        scale,
        window,
        sinks,
        share,
    )
    sizes = sizes_of(query, value)
    wing = choose("topk_attention", query, backend, **sizes)
    why_not = reasons("topk_attention", query.device.type, query.dtype, **sizes)
    return Explanation("topk_attention", wing, why_not)
