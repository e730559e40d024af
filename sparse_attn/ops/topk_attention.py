"""`topk_attention`: select and attend in one op, in place of scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops import gathered_attention, topk_select
from sparse_attn.ops import key_index as key_indices
from sparse_attn.ops import tail as tails
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.derivatives import derivatives_wanted, only_backward_wanted
from sparse_attn.ops.key_index import KeyIndex
from sparse_attn.ops.shards import on_one_process, shardable
from sparse_attn.rule import PackedRule, Rule
from sparse_attn.wings import extension
from sparse_attn.wings.base import Explanation, explain_call, measured


def fake(query, key, value, top_k, rule: PackedRule) -> tuple[Tensor, Tensor, Tensor]:
    indices = topk_select.fake(query, key, top_k, rule)
    return *gathered_attention.fake(query, key, value), indices


def tangent(call: Forward, query, key, value, top_k, rule: PackedRule) -> dict[str, Tensor]:
    """Through the selected keys; the choice is constant."""
    scoring = rule.scale, rule.softcap, rule.sink_logits
    return gathered_attention.tangent(call, query, key, value, call.results.indices, *scoring)


OP = Op(
    "topk_attention",
    f"(Tensor query, Tensor key, Tensor value, SymInt top_k, {rules.SCHEMA}) -> "
    "(Tensor out, Tensor lse, Tensor indices)",
    fake,
    saved=gathered_attention.SAVED,
    constant="indices",
    backward=gathered_attention.backward,
    tangent=tangent,
    batch="query key value out lse indices",
)

# The same with a key index, whose selection hands its scores over as that of topk_attention does. A wing without it has
# indexed_select, and attention that does not depend on how its keys were found.
INDEXED = Op(
    "indexed_attention",
    f"(Tensor query, Tensor key, Tensor value, SymInt top_k, {rules.SCHEMA}, {key_indices.PARTS}) -> "
    "(Tensor out, Tensor lse, Tensor indices)",
    lambda query, key, value, top_k, rule, *index: fake(query, key, value, top_k, rule),
    saved=gathered_attention.SAVED,
    constant="indices",
    backward=gathered_attention.backward,
    tangent=lambda call, query, key, value, top_k, rule, **index: tangent(
        call, query, key, value, top_k, rule
    ),
)

# out and lse alone, with the same bits, for calls that want no gradient: where K is large the indices are most of what
# is written. No wing must have it.
OUTPUT = Op(
    "topk_attention_output",
    f"(Tensor query, Tensor key, Tensor value, SymInt top_k, {rules.SCHEMA}) -> (Tensor out, Tensor lse)",
    lambda query, key, value, top_k, rule: gathered_attention.fake(query, key, value),
    batch="query key value out lse",
)

# And for calls that want a gradient: the selection as bits, ⌈Tk / 32⌉ words a row, of which the gradient is made by
# dense tiles. No forward mode; no wing must have it.
BITS_BACKWARD = Op(
    "topk_attention_bits_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor bits, Tensor out, "
    "Tensor lse, float scale, float softcap, Tensor? sink_logits) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    gathered_attention.fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value bits out lse grad_query grad_key grad_value",
    shared="sink_logits",
)


def fake_bits(query, key, value, top_k, rule: PackedRule) -> tuple[Tensor, Tensor, Tensor]:
    bits = query.new_empty((*query.shape[:3], (key.shape[2] + 31) // 32), dtype=torch.int32)
    return *gathered_attention.fake(query, key, value), bits


def backward_by_bits(call: Backward) -> dict[str, Tensor]:
    s, grads = call.saved, call.grads
    grad_out = torch.zeros_like(s.out) if grads.out is None else grads.out
    found = BITS_BACKWARD.on(call.wing)(
        grad_out, grads.lse, s.query, s.key, s.value, s.bits, s.out, s.lse, s.scale, s.softcap, s.sink_logits
    )
    return gathered_attention.named_gradients(call, found, grad_out)


BITS = Op(
    "topk_attention_bits",
    f"(Tensor query, Tensor key, Tensor value, SymInt top_k, {rules.SCHEMA}) -> "
    "(Tensor out, Tensor lse, Tensor bits)",
    fake_bits,
    saved="query key value bits out lse scale softcap sink_logits",
    constant="bits",
    backward=backward_by_bits,
    batch="query key value out lse bits",
)
FEW_KEPT = 512  # csrc/cpu/masked_attention.h: calls that keep fewer keys gather them, by their indices


@shardable("query:BHTD key:BHSD value:BHSD rule", "BHTD BHT BGTK")
def attend_best(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: Rule,
    *,
    key_index: KeyIndex | None = None,
    backend: str | None = None,
    function: str | None = None,
    wants_indices: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq], indices [B, G, Tq, K]) of the selection by true q·k.

    Without `wants_indices` (on one process alone) they are empty where nothing else needs them.
    """
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    top_k = checks.top_k_of(top_k)
    packed = rule.packed(query, key, top_k)
    index = key_index if key_indices.serves(key_index, query, key, packed) else None
    sizes = sizes_of(query, value)
    sizes["keys"], sizes["top_k"] = key.shape[2], top_k
    if index is not None:
        sizes["key_index"] = 1
    wing = OP.choose(query, backend, rule=rule, function=function, sizes=sizes)
    if index is not None and INDEXED.has(wing):
        return INDEXED.on(wing)(query, key, value, top_k, *packed.parts(), *index.tensors())
    if index is not None and key_indices.OP.has(wing):
        indices = key_indices.OP.on(wing)(query, key, top_k, *packed.parts(), *index.tensors())
        scoring = packed.scale, packed.softcap, packed.sink_logits
        return *gathered_attention.OP.on(wing)(query, key, value, indices, *scoring), indices
    if not wants_indices and top_k >= FEW_KEPT and OUTPUT.has(wing):
        arguments = query, key, value, top_k, *packed.parts()
        if not derivatives_wanted(arguments):
            return *OUTPUT.on(wing)(*arguments), query.new_empty(0, dtype=torch.int32)
        if BITS.has(wing) and only_backward_wanted(arguments) and _by_bits(query, key, value, top_k, rule):
            out, lse, _ = BITS.on(wing)(*arguments)
            return out, lse, query.new_empty(0, dtype=torch.int32)
    return OP.on(wing)(query, key, value, top_k, *packed.parts())


def _by_bits(query: Tensor, key: Tensor, value: Tensor, top_k: int, rule: Rule) -> bool:
    """Whether the gradient of such a call is cheaper by dense tiles, as far as its shapes tell."""
    if rule.share != "none" or rule.attn_mask is not None:
        return False
    queries, keys = query.shape[2], key.shape[2]
    first = keys  # keys that the first query sees
    if rule.is_causal:
        if isinstance(rule.causal_offset, Tensor):
            return False
        first = max(1, min(keys, (keys - queries if rule.causal_offset is None else rule.causal_offset) + 1))
    return extension.module.backward_tiles_pay(first, keys, top_k, query.shape[3] + value.shape[3])


def attend_all(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: Rule,
    tail: str,
    *,
    key_index: KeyIndex | None = None,
    backend: str | None = None,
    function: str = "topk_attention",
    wants_indices: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_best` with a tail: what is left out counts, too."""
    tails.check_rule(rule)
    top_k = checks.top_k_of(top_k)
    if on_one_process(query):  # else each of the stages below is called for the parts
        checks.query_key(query, key)
        if top_k >= key.shape[2]:  # nothing is left out
            return attend_best(
                query, key, value, top_k, rule, key_index=key_index, backend=backend, function=function
            )
    if tail == "blocks":
        if not wants_indices and top_k >= FEW_KEPT and on_one_process(query) and key_index is None:
            found = _with_blocks_by_bits(query, key, value, top_k, rule, backend, function)
            if found is not None:
                return *found, query.new_empty(0, dtype=torch.int32)
        out, lse, indices = attend_best(
            query, key, value, top_k, rule, key_index=key_index, backend=backend, function=function
        )
        found = tails.with_blocks(
            query, key, value, out, lse, indices, rule, backend=backend, function=function
        )
        return *found, indices
    indices = topk_select.select(
        query, key, top_k, rule, key_index=key_index, backend=backend, function=function
    )
    return *tails.attend(query, key, value, indices, rule, backend=backend, function=function), indices


def _with_blocks_by_bits(
    query: Tensor, key: Tensor, value: Tensor, top_k: int, rule: Rule, backend: str | None, function: str
) -> tuple[Tensor, Tensor] | None:
    """tail="blocks" where the selection need not be more than bits: indices of a large K are more to write than all the
    rest. None where it must."""
    query, key, value = autocast(query, key, value)
    checks.value_of(key, value)
    packed = rule.packed(query, key, top_k)
    sizes = sizes_of(query, value) | {"keys": key.shape[2], "top_k": top_k}
    wing = OP.choose(query, backend, rule=rule, function=function, sizes=sizes)
    if not (BITS.has(wing) and tails.one_op(wing, query, key, value, rule)) or rule.share != "none":
        return None
    if derivatives_wanted((query, key, value)) and not _by_bits(query, key, value, top_k, rule):
        return None
    with torch.no_grad():
        out, lse, bits = BITS.on(wing)(query, key, value, top_k, *packed.parts())
    return tails.join(wing, query, key, value, bits, True, out, lse, rule)


def topk_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    return_lse: bool = False,
    return_indices: bool = False,
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    tail: str = "none",
    key_index: KeyIndex | None = None,
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
        causal_offset: offset of the diagonal; must be given when Tq ≠ Tk (Tk − Tq: the queries are the last). A tensor,
            int32 or int64 [B] or [B, Tq], gives each sequence, or query, its own.
        attn_mask: boolean, True = may attend, broadcastable to [B, Hq, Tq, Tk]; the same for heads that share.
        key_lengths: int32 or int64 [B]; keys at and past it do not exist.
        scale: factor of q·k, default 1/√D.
        window: always keep the last `window` visible positions up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        return_lse: also return the log-sum-exp of the attended scores, float32 [B, Hq, Tq] (differentiable); with
            tail="mean" of all visible keys, with "blocks" of the chosen and the blocks.
        return_indices: also return the selection, int32 [B, G, Tq, min(top_k, Tk)].
        key_starts: int32 or int64 [B] or [B, Tq]; keys before it do not exist for that sequence, or that query, and
            `sinks` counts from there. Indices stay what they are. Values below 0 count as 0; Tk hides every key.
        softcap, sink_logits: as in :func:`gathered_attention`: scores bounded by softcap · tanh(· / softcap), and one
            more logit per query head, float [Hq], in the denominator (differentiable).
        tail: what becomes of the visible keys that are not chosen. "none": they do not count. "mean": the softmax is
            over all visible keys, and those have the mean of their values, each query its own; needs every score
            again, and for the gradient once more. "blocks": they count by blocks of 64 keys, each with the score of
            its mean key and its mean value, as often as it has keys that are not chosen; cheap. Of blocks those count
            that a query sees whole. With a tail there is no attn_mask (docs/topk_attention.md has formulas and cost).
        key_index: the :class:`sparse_attn.KeyIndex` of these keys: the same result, in decoding for fewer bytes.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses. See :func:`explain`.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype; with flags the tuple (out, lse, indices) of what was asked for,
        in that order. A query that sees no key has out 0, lse −inf (with sink_logits the head's sink) and gradient 0.
        A row with NaN or a score of +inf among its keys is NaN (inf − inf, as the formula has it).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for (docs/torch_func.md says what is there).

    Sources: Gupta et al., "Memory-efficient Transformers via Top-k Attention" (2021); sinks: Xiao et al.,
    "Efficient Streaming Language Models with Attention Sinks" (2023).

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 8, 256, 64, requires_grad=True) for _ in range(3))
        >>> out = sparse_attn.topk_attention(q, k, v, top_k=32, is_causal=True, window=8, sinks=4)
        >>> out.sum().backward()
    """
    return_lse = checks.boolean("return_lse", return_lse)
    return_indices = checks.boolean("return_indices", return_indices)
    scoring = scale, softcap, sink_logits
    rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, window, sinks, share, *scoring, key_starts)
    if checks.tail_of(tail) != "none":
        out, lse, indices = attend_all(
            query, key, value, top_k, rule, tail, key_index=key_index, backend=backend,
            wants_indices=return_indices,
        )  # fmt: skip
        return _asked_for(out, lse, indices, return_lse, return_indices)
    # Only where it says something: over several processes nobody knows this option.
    wants: dict[str, Any] = {} if return_indices or not on_one_process(query) else {"wants_indices": False}
    out, lse, indices = attend_best(
        query, key, value, top_k, rule, key_index=key_index, backend=backend, **wants
    )
    return _asked_for(out, lse, indices, return_lse, return_indices)


def _asked_for(
    out: Tensor, lse: Tensor, indices: Tensor, return_lse: bool, return_indices: bool
) -> Tensor | tuple[Tensor, ...]:
    if not return_lse and not return_indices:
        return out
    return (out, *((lse,) if return_lse else ()), *((indices,) if return_indices else ()))


def topk_attention_with_residual(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:
    r"""`topk_attention` that gives the mass of the keys it leaves out to the mean of their values.

    With p the softmax over all visible keys V_i and S_i the selection:

    .. math:: \mathrm{out}_i = \sum_{j \in S_i} p_{ij} v_j + \Bigl(1 - \sum_{j \in S_i} p_{ij}\Bigr)
              \mathop{\mathrm{mean}}_{j \in V_i \setminus S_i} v_j

    The same as ``topk_attention(…, tail="mean")``.

    Args:
        query, key, value, top_k, is_causal, causal_offset, key_lengths, scale, window, sinks, share, key_starts,
            softcap, sink_logits, backend: as in :func:`topk_attention`. There is no attn_mask: what a query sees must
            be keys in a row.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
        >>> sparse_attn.topk_attention_with_residual(q, k, v, 16, is_causal=True).shape
        torch.Size([1, 2, 128, 16])
    """
    scoring = scale, softcap, sink_logits
    rule = Rule(is_causal, causal_offset, None, key_lengths, window, sinks, share, *scoring, key_starts)
    return attend_all(query, key, value, top_k, rule, "mean", backend=backend)[0]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    return_lse: bool = False,
    return_indices: bool = False,
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    tail: str = "none",
    key_index: KeyIndex | None = None,
    backend: str | None = None,
    measure: bool = False,
) -> Explanation:
    """Says which wing `topk_attention` with these arguments would run on, and why not each other one.

    Takes the arguments of :func:`topk_attention`, and raises what it would raise. Runs nothing, unless it is to
    `measure`: then the call runs once, without gradients, and `measured` says what the wing knows of it. That is on
    the CPU whether keys were selected by bounds, how many of them per key of the budget the bounds left and how many
    of these were scored again, and how many blocks of queries were given up for the full product (counted for the
    process: what other threads run meanwhile counts, too).

    Example:
        >>> import torch, sparse_attn
        >>> q = torch.randn(1, 2, 8, 16, dtype=torch.float64)
        >>> print(sparse_attn.explain(q, q, q, 4).backend)
        reference
        >>> print(sparse_attn.explain(q, q, q, 4, measure=True).measured)  # the reference counts nothing
        None
    """
    measure = checks.boolean("measure", measure)
    call = partial(
        topk_attention, query, key, value, top_k, is_causal=is_causal, causal_offset=causal_offset,
        attn_mask=attn_mask, key_lengths=key_lengths, scale=scale, window=window, sinks=sinks, share=share,
        return_lse=return_lse, return_indices=return_indices, key_starts=key_starts, softcap=softcap,
        sink_logits=sink_logits, tail=tail, key_index=key_index, backend=backend,
    )  # fmt: skip
    explanation = explain_call(call)
    if tail != "none" and top_k < key.shape[2]:  # an op of its own, behind the selection
        rule = Rule(is_causal, causal_offset, key_lengths=key_lengths, key_starts=key_starts)
        own = explain_call(tails.wing_of, tails.OF_TAIL[tail], *autocast(query, value), rule, backend)
        of_tail = f"the tail on the {own.backend!r} wing"
        way = of_tail if explanation.way is None else f"{explanation.way}; {of_tail}"
        explanation = replace(explanation, way=way)
    if not measure:
        return explanation
    with torch.no_grad():
        return measured(explanation, call)
