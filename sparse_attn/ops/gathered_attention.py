"""`gathered_attention`: softmax attention of each query to the keys that `indices` names, with gradients."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import Rule
from sparse_attn.wings.reference.gathered_attention import along


def fake(query, key, value, *others) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty((*rows, value.shape[3])), query.new_empty(rows, dtype=torch.float32)


def fake_gradients(grad_out, grad_lse, query, key, value, *others) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


BACKWARD = Op(
    "gathered_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor indices, Tensor out, "
    "Tensor lse, float scale, float softcap, Tensor? sink_logits, bool atomics) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value indices out lse grad_query grad_key grad_value",
    shared="sink_logits",
)


def backward(call: Backward) -> dict[str, Tensor]:
    """Of gathered_attention and of topk_attention."""
    s, grads = call.saved, call.grads
    grad_out = torch.zeros_like(s.out) if grads.out is None else grads.out
    found = BACKWARD.on(call.wing)(
        grad_out, grads.lse, s.query, s.key, s.value, s.indices, s.out, s.lse, s.scale, s.softcap,
        s.sink_logits, uses_atomics(),
    )  # fmt: skip
    return named_gradients(call, found, grad_out)


def named_gradients(call: Backward, found: tuple[Tensor, ...], grad_out: Tensor) -> dict[str, Tensor]:
    """The gradients of query, key and value, and that of `sink_logits` where it is wanted."""
    s, grads = call.saved, call.grads
    named = dict(zip(("query", "key", "value"), found, strict=True))
    if call.needs["sink_logits"]:
        named["sink_logits"] = sink_gradient(s.sink_logits, s.out, s.lse, grad_out, grads.lse)
    return named


def sink_gradient(
    sink_logits: Tensor,  # [Hq]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
) -> Tensor:  # [Hq]
    """Σ_{b,i} exp(sink − LSE) · (dLSE − Σ_d dO ∘ O): a sink is a key whose value is 0."""
    dtype = sink_logits.dtype
    change = -(grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        change = change + grad_lse
    # Where not even the sink weighs anything the LSE is −inf.
    share = torch.where(lse == -torch.inf, 0.0, (sink_logits.unsqueeze(-1) - lse).exp())
    # All of it twice: torch divides a sum that is a single number among its threads.
    return (share * change).expand(2, *lse.shape).sum((1, 3))[0]


def tangent(call: Forward, query, key, value, indices, scale, softcap, sink_logits) -> dict[str, Tensor]:
    out, lse = along(query, key, value, indices, scale, softcap, sink_logits, call.tangents)
    return {"out": out, "lse": lse}


def uses_atomics() -> bool:
    """Whether the GPU wings may add up dK and dV in no fixed order; the others never do."""
    asked = os.environ.get("SPARSE_ATTN_ATOMICS") == "1"
    return asked and not torch.are_deterministic_algorithms_enabled()


SAVED = "query key value indices out lse scale softcap sink_logits"
OP = Op(
    "gathered_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor indices, float scale, float softcap, Tensor? sink_logits) -> "
    "(Tensor out, Tensor lse)",
    fake,
    saved=SAVED,
    backward=backward,
    tangent=tangent,
    batch="query key value indices out lse",
    shared="sink_logits",
)


@shardable("query:BHTD key:BHSD value:BHSD indices:BGTK sink_logits:H", "BHTD BHT")
def attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]) of `gathered_attention`."""
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    indices = checks.indices_of(indices, query, key)
    scale = checks.softmax_scale(scale, query.shape[3])
    cap, said = 0.0, None
    if softcap is not None or sink_logits is not None:
        said = Rule(softcap=softcap, sink_logits=sink_logits)
        cap = checks.soft_cap(softcap)
        if sink_logits is not None:
            sink_logits = checks.sink_logits_of(sink_logits, query)
    wing = OP.choose(query, backend, rule=said, sizes=sizes_of(query, value))
    return OP.on(wing)(query, key, value, indices, scale, cap, sink_logits)


def gathered_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    *,
    scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each query to its own gathered keys, differentiable in query, key and value.

    With S the filled slots of the query's row of `indices`:

    .. math:: \mathrm{out}_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j

    With `softcap` = c a score is :math:`c \tanh(s\, q_i \cdot k_j / c)`. With `sink_logits` the softmax of head h has
    one more logit, without a value:
    :math:`\mathrm{out}_i = \sum_j e^{s_{ij}} v_j / (e^{\mathrm{sink}_h} + \sum_j e^{s_{ij}})`.

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
        softcap: bound of the scores, positive (Gemma 2 has 50); None: none.
        sink_logits: float [Hq] on the query's device (`s_aux` of gpt-oss), differentiable; None: none. The LSE has
            them in it.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with return_lse (out, lse float32 [B, Hq, Tq]). A query with no
        filled slot has out 0, lse −inf (with sink_logits the head's sink) and gradient 0.
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
    out, lse = attend(
        query, key, value, indices, scale=scale, softcap=softcap, sink_logits=sink_logits, backend=backend
    )
    return (out, lse) if return_lse else out
