"""Attention to a selection in which what the selection leaves out counts too, with the mean of its values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops import gathered_attention
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.derivatives import derivatives_wanted, only_backward_wanted
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import PackedRule, Rule
from sparse_attn.wings.base import forced_wing
from sparse_attn.wings.reference.block_tail import along as along_blocks
from sparse_attn.wings.reference.tail_attention import along

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor indices"


def fake(query, key, value, indices, rule: PackedRule) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = gathered_attention.fake(query, key, value)
    return out, lse, torch.empty_like(lse)


BACKWARD = Op(
    "tail_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, Tensor outside, {rules.SCHEMA}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    gathered_attention.fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value indices out lse outside grad_query grad_key grad_value",
)


def backward(call: Backward) -> dict[str, Tensor]:
    s, grad_out = call.saved, call.grads.out
    if grad_out is None:
        grad_out = torch.zeros_like(s.out)
    found = BACKWARD.on(call.wing)(
        grad_out, call.grads.lse, s.query, s.key, s.value, s.indices, s.out, s.lse, s.outside,
        s.attn_mask, s.key_lengths, s.key_starts, s.causal_offsets, s.rule, s.scale, s.softcap, s.sink_logits,
    )  # fmt: skip
    of_sinks = {}
    if call.needs["sink_logits"]:
        of_sinks["sink_logits"] = gathered_attention.sink_gradient(
            s.sink_logits, s.out, s.lse, grad_out, call.grads.lse
        )
    return dict(zip(("query", "key", "value"), found, strict=True)) | of_sinks


def tangent(call: Forward, query, key, value, indices, rule: PackedRule) -> dict[str, Tensor]:
    out, lse = along(query, key, value, indices, rule, call.tangents)
    return {"out": out, "lse": lse}


# outside: the probability of the keys that are left out.
OP = Op(
    "tail_attention",
    f"({_INPUTS}, {rules.SCHEMA}) -> (Tensor out, Tensor lse, Tensor outside)",
    fake,
    saved="query key value indices out lse outside attn_mask key_lengths key_starts causal_offsets rule scale "
    "softcap sink_logits",
    constant="outside",
    backward=backward,
    tangent=tangent,
    batch="query key value indices out lse outside",
)


def check_rule(rule: Rule) -> Rule:
    """What the rule says of visibility; refused where it is more than keys in a row, whose values have prefix sums."""
    known = "is_causal", "causal_offset", "key_lengths", "key_starts", "scale", "softcap", "sink_logits"
    visible = rule.visibility()
    visible.only("means of what is left out", *known, rules.OFFSETS)
    return visible


def wing_of(
    op: Op, query: Tensor, value: Tensor, rule: Rule, backend: str | None, function: str | None = None
) -> str:
    """The wing of a tail. One without the op has it in plain PyTorch: all else stays where the call wants it."""
    forced = forced_wing(backend)
    if forced is not None and not op.has(forced):
        backend = "reference"
    return op.choose(query, backend, rule=rule, function=function, sizes=sizes_of(query, value))


@shardable("query:BHTD key:BHSD value:BHSD indices:BGTK rule", "BHTD BHT")
def attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]: the selection
    rule: Rule,
    *,
    backend: str | None = None,
    function: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]) of all keys that a query sees, the left out with their mean value.

    Of the selection count keys that the query sees, each once.
    """
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    indices = checks.indices_of(indices, query, key)
    visible = check_rule(rule)
    packed = visible.packed(query, key)._replace(groups=indices.shape[1])
    wing = wing_of(OP, query, value, visible, backend, function)
    return OP.on(wing)(query, key, value, indices, *packed.parts())[:2]


# ---- tail="blocks"

BLOCK = 64  # keys; larger ones cost less and say less
_BLOCK_SIZES = "SymInt key_length, SymInt block_size"


def _fake_blocks(query, key, value, *others) -> tuple[Tensor, Tensor]:
    return gathered_attention.fake(query, key, value)


BLOCKS_BACKWARD = Op(
    "block_tail_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_BLOCK_SIZES}, {rules.SCHEMA}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    gathered_attention.fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value indices out lse grad_query grad_key grad_value",
)


def _backward_of_blocks(call: Backward) -> dict[str, Tensor]:
    s = call.saved
    grad_out = torch.zeros_like(s.out) if call.grads.out is None else call.grads.out
    found = BLOCKS_BACKWARD.on(call.wing)(
        grad_out, call.grads.lse, s.query, s.key, s.value, s.indices, s.out, s.lse, s.key_length, s.block_size,
        s.attn_mask, s.key_lengths, s.key_starts, s.causal_offsets, s.rule, s.scale, s.softcap, s.sink_logits,
    )  # fmt: skip
    return dict(zip(("query", "key", "value"), found, strict=True))


def _tangent_of_blocks(
    call: Forward, query, key, value, indices, key_length, block_size, rule: PackedRule
) -> dict[str, Tensor]:
    out, lse = along_blocks(query, key, value, indices, key_length, block_size, rule, call.tangents)
    return {"out": out, "lse": lse}


# key and value are the means of whole blocks; sink_logits count with the selection, not here.
BLOCKS = Op(
    "block_tail",
    f"({_INPUTS}, {_BLOCK_SIZES}, {rules.SCHEMA}) -> (Tensor out, Tensor lse)",
    _fake_blocks,
    saved="query key value indices out lse key_length block_size attn_mask key_lengths key_starts causal_offsets "
    "rule scale softcap sink_logits",
    backward=_backward_of_blocks,
    tangent=_tangent_of_blocks,
    batch="query key value indices out lse",
)


OF_TAIL = {"mean": OP, "blocks": BLOCKS}


# The selection and its blocks as one softmax, without a pass over [B, Hq, Tq, Dv] between the two and with one gradient
# for both. `own_out` and `own_lse`, of the selection alone, are constants here; key_means and value_means are made of
# key and value, whose gradients have theirs in them. `selection` is indices, or bits as of topk_attention_bits.
# No forward mode; no wing must have it.
_JOINED_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor key_means, Tensor value_means, "
    "Tensor selection, bool as_bits"
)
JOINED_BACKWARD = Op(
    "attention_with_blocks_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_JOINED_INPUTS}, Tensor out, Tensor lse, {_BLOCK_SIZES}, {rules.SCHEMA}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    gathered_attention.fake_gradients,
    gradient_of="attention",
    batch="grad_out grad_lse query key value key_means value_means selection out lse grad_query grad_key grad_value",
)


def _backward_of_both(call: Backward) -> dict[str, Tensor]:
    s = call.saved
    grad_out = torch.zeros_like(s.out) if call.grads.out is None else call.grads.out
    found = JOINED_BACKWARD.on(call.wing)(
        grad_out, call.grads.lse, s.query, s.key, s.value, s.key_means, s.value_means, s.selection, s.as_bits,
        s.out, s.lse, s.key_length, s.block_size, s.attn_mask, s.key_lengths, s.key_starts, s.causal_offsets,
        s.rule, s.scale, s.softcap, s.sink_logits,
    )  # fmt: skip
    return gathered_attention.named_gradients(call, found, grad_out)


JOINED = Op(
    "attention_with_blocks",
    f"({_JOINED_INPUTS}, Tensor own_out, Tensor own_lse, {_BLOCK_SIZES}, {rules.SCHEMA}) -> (Tensor out, Tensor lse)",
    _fake_blocks,
    saved="query key value key_means value_means selection as_bits out lse key_length block_size attn_mask key_lengths "
    "key_starts causal_offsets rule scale softcap sink_logits",
    backward=_backward_of_both,
    batch="query key value key_means value_means selection own_out own_lse out lse",
)


def one_op(wing: str, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> bool:
    """Whether selection and blocks are joined by one op there. Half types have two: their `out` is rounded."""
    arguments = query, key, value, *(() if rule.sink_logits is None else (rule.sink_logits,))
    wanted = derivatives_wanted(arguments)
    return (
        JOINED.has(wing) and query.dtype == torch.float32 and (not wanted or only_backward_wanted(arguments))
    )


def join(
    wing: str, query: Tensor, key: Tensor, value: Tensor, selection: Tensor, as_bits: bool, out: Tensor, lse: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`with_blocks` by one op."""
    packed = check_rule(rule).packed(query, key)._replace(groups=selection.shape[1])
    means = _means(key.detach()), _means(value.detach())
    own = out.detach(), lse.detach()
    sizes = key.shape[2], BLOCK
    return JOINED.on(wing)(query, key, value, *means, selection, as_bits, *own, *sizes, *packed.parts())


@shardable("query:BHTD key:BHSD value:BHSD out:BHTD lse:BHT indices:BGTK rule", "BHTD BHT")
def with_blocks(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    out: Tensor,  # [B, Hq, Tq, Dv]: attention to the selection
    lse: Tensor,  # [B, Hq, Tq]: of the selection
    indices: Tensor,  # int32 [B, G, Tq, K]: the selection
    rule: Rule,
    *,
    backend: str | None = None,
    function: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the selection and the means of whole blocks, each with the weight of its keys that are left out."""
    query, key, value = autocast(query, key, value)
    visible = replace(check_rule(rule), sink_logits=None)
    wing = wing_of(BLOCKS, query, value, visible, backend, function)
    length = key.shape[2]
    if one_op(wing, query, key, value, rule):
        return join(wing, query, key, value, indices, False, out, lse, rule)
    packed = visible.packed(query, key)._replace(groups=indices.shape[1])
    keys, values = _means(key), _means(value)
    rest, rest_lse = BLOCKS.on(wing)(query, keys, values, indices, length, BLOCK, *packed.parts())
    some = rest_lse != -torch.inf  # of NaN, too
    rest_lse = torch.where(some, rest_lse, lse.detach())
    # Where nothing is left out no gradient may come from it.
    share = torch.where(some, torch.sigmoid(rest_lse - lse), 0.0).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, rest, share), torch.where(some, torch.logaddexp(lse, rest_lse), lse)


def _means(rows: Tensor) -> Tensor:
    """Of whole blocks: [B, H, T, C] → [B, H, T // BLOCK, C]."""
    count = rows.shape[2] // BLOCK
    return rows[:, :, : count * BLOCK].unflatten(2, (count, BLOCK)).mean(3)
