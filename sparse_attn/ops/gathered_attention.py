"""`gathered_attention`: softmax attention of each query to the keys that `indices` names, with gradients."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.wings.reference.gathered_attention import along


def fake(query, key, value, indices, scale) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty((*rows, value.shape[3])), query.new_empty(rows, dtype=torch.float32)


def fake_gradients(grad_out, grad_lse, query, key, value, *others) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


BACKWARD = Op(
    "gathered_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor indices, Tensor out, "
    "Tensor lse, float scale, bool atomics) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value indices out lse grad_query grad_key grad_value",
)


def backward(call: Backward) -> dict[str, Tensor]:
    """Of gathered_attention and of topk_attention."""
    s, grads = call.saved, call.grads
    grad_out = torch.zeros_like(s.out) if grads.out is None else grads.out
    found = BACKWARD.on(call.wing)(
        grad_out, grads.lse, s.query, s.key, s.value, s.indices, s.out, s.lse, s.scale, uses_atomics()
    )
    return dict(zip(("query", "key", "value"), found, strict=True))


def tangent(call: Forward, query, key, value, indices, scale) -> dict[str, Tensor]:
    moves = call.tangents
    out, lse = along(query, key, value, indices, scale, moves.query, moves.key, moves.value)
    return {"out": out, "lse": lse}


def uses_atomics() -> bool:
    """Whether the GPU wings may add up dK and dV in no fixed order; the others never do."""
    asked = os.environ.get("SPARSE_ATTN_ATOMICS") == "1"
    return asked and not torch.are_deterministic_algorithms_enabled()


SAVED = "query key value indices out lse scale"
OP = Op(
    "gathered_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, float scale) -> (Tensor out, Tensor lse)",
    fake,
    saved=SAVED,
    backward=backward,
    tangent=tangent,
    batch="query key value indices out lse",
)


def attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]) of `gathered_attention`."""
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    indices = checks.indices_of(indices, query, key)
    scale = checks.softmax_scale(scale, query.shape[3])
    wing = OP.choose(query, backend, sizes=sizes_of(query, value))
    return OP.on(wing)(query, key, value, indices, scale)


def gathered_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each query to its own gathered keys, differentiable in query, key and value.

    With S the filled slots of the query's row of `indices`:

    .. math:: \mathrm{out}_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j

    Nothing of size [Tq, Tk] is stored; half types accumulate in float32; the backward is deterministic, the same
    for any number of threads, unless SPARSE_ATTN_ATOMICS=1 in the environment asks the GPU wings for atomic additions
    (which ``torch.use_deterministic_algorithms(True)`` overrides).

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv.
        value: [B, Hkv, Tk, Dv]; Dv may differ from D.
        indices: int32 (or int64) [B, G, Tq, K], G one of 1, Hkv, Hq, or [B, Tq, K] for G = 1. Any index < 0 or
            ≥ Tk is an empty slot and is never read through. An index given twice counts twice.
        scale: factor of q·k, default 1/√D.
        return_lse: also return the natural-log-sum-exp of the attended scores (differentiable).
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with return_lse (out, lse float32 [B, Hq, Tq]). A query with no
        filled slot has out 0, lse −inf and gradient 0.
        A row with NaN or a score of +inf among its keys is NaN (inf − inf, as the formula has it).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for (docs/torch_func.md says what is there).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> indices = sparse_attn.topk_select(q, k, 8, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 2, 64, 16])
    """
    return_lse = checks.boolean("return_lse", return_lse)
    out, lse = attend(query, key, value, indices, scale=scale, backend=backend)
    return (out, lse) if return_lse else out
