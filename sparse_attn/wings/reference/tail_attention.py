"""Definition of `tail_attention` and of its gradient: dense attention in which what is left out has one value."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.gathered_attention import (
    cap_slopes,
    lse_along_nothing,
    lse_of_nothing,
    sink_share,
    softmax,
)
from sparse_attn.wings.reference.rule import VisibleKeys, capped
from sparse_attn.wings.reference.topk_select import products
from sparse_attn.wings.reference.wing import implements


class _Chunk:
    """Some queries beside all keys, as they are computed with."""

    def __init__(
        self, rows: slice, query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, rule: PackedRule,
        visible: Tensor, look: bool,
    ) -> None:  # fmt: skip
        heads, key_length = query.shape[1], keys.shape[2]
        self.rows, self.query, self.keys, self.values = rows, query[:, :, rows].to(keys.dtype), keys, values
        self.scale = rule.scale
        chosen = indices[:, :, rows]
        chosen = torch.where((chosen >= 0) & (chosen < key_length), chosen, key_length).to(torch.int64)
        marks = torch.zeros((*chosen.shape[:3], key_length + 1), dtype=torch.bool, device=query.device)
        marks = marks.scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))[..., :key_length]
        marks = marks.repeat_interleave(heads // marks.shape[1], dim=1)
        self.visible = visible.expand_as(marks)  # bool [B, Hq, t, Tk]
        self.chosen, self.left_out = marks & self.visible, self.visible & ~marks
        self.count = self.left_out.sum(-1, keepdim=True).to(keys.dtype)  # [B, Hq, t, 1]
        scores = capped(products(self.query, keys) * rule.scale, rule.softcap)
        scores = scores.masked_fill(~self.visible, -torch.inf)
        sink = None if rule.sink_logits is None else rule.sink_logits.view(-1, 1, 1)
        self.probabilities, self.lse = softmax(scores, sink)
        self.slopes = cap_slopes(scores.masked_fill(~self.visible, 0.0), rule.softcap) * rule.scale
        self.kept = self.probabilities.masked_fill(~self.chosen, 0.0)
        self.mass = self.probabilities.masked_fill(~self.left_out, 0.0)
        self.outside = self.mass.sum(-1, keepdim=True)  # [B, Hq, t, 1]
        self.mean = self.left_out / self.count.clamp(min=1)
        self.tail = weighted(self.mean, self.left_out, values, look)

    def moves(self, query_move: Tensor | None, key_move: Tensor | None) -> Tensor:
        """The change of the scores, [B, Hq, t, Tk]."""
        moves = torch.zeros_like(self.probabilities)
        if query_move is not None:
            moves = moves + products(query_move[:, :, self.rows].to(self.keys.dtype), self.keys)
        if key_move is not None:
            moves = moves + products(self.query, key_move.to(self.keys.dtype))
        return (moves * self.slopes).masked_fill(~self.visible, 0.0)


def weighted(weights: Tensor, counted: Tensor, rows: Tensor, look: bool = True) -> Tensor:
    """Σ_j weights · rows over the counted keys: [B, Hq, t, Tk], bool likewise, [B, Hkv, Tk, C] → [B, Hq, t, C].

    A row that is no number reaches those alone that count it: 0 · NaN is NaN. `look`: whether there is one is asked.
    """
    kv_heads = rows.shape[1]

    def times(left: Tensor, right: Tensor) -> Tensor:
        return (
            (left.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ right)
            .unflatten(2, (-1, left.shape[2]))
            .flatten(1, 2)
        )

    total = times(weights, rows.nan_to_num(0.0, 0.0, 0.0))
    if look and bool(rows.isfinite().all()):
        return total
    for special, there in (
        (torch.inf, rows == torch.inf),
        (-torch.inf, rows == -torch.inf),
        (torch.nan, rows.isnan()),
    ):
        met = times(counted.to(rows.dtype), there.to(rows.dtype)) > 0
        total = total + torch.where(met, special, 0.0)
    return total


def times_transposed(weights: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """Σ_i weights · rows over queries and the heads of a key head: [B, Hq, t, Tk], [B, Hq, t, C] → [B, Hkv, Tk, C]."""
    left, right = (t.unflatten(1, (kv_heads, -1)).flatten(2, 3) for t in (weights, rows))
    return left.mT @ right


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, rule: PackedRule, look: bool = True
) -> Iterator[_Chunk]:
    batch, heads, query_length = query.shape[:3]
    compute = torch.promote_types(query.dtype, torch.float32)
    keys, values = key.to(compute), value.to(compute)
    seen_by = VisibleKeys(key, rule._replace(groups=1))
    # A dozen of matrices stand side by side.
    for rows in query_chunks(query_length, 8 * batch * heads * key.shape[2]):
        yield _Chunk(rows, query, keys, values, indices, rule, seen_by.of(rows)[0], look)


@implements
def tail_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq], outside likewise
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    lse = lse_of_nothing(query, rule.sink_logits)
    outside = torch.zeros_like(lse)
    if out.numel() == 0 or key.shape[2] == 0:
        return out, lse, outside
    for chunk in _chunks(query, key, value, indices, rule):
        kept = weighted(chunk.kept, chunk.chosen, chunk.values)
        found = kept + torch.where(chunk.count > 0, chunk.outside * chunk.tail, 0.0)
        out[:, :, chunk.rows] = found.to(out.dtype)
        lse[:, :, chunk.rows] = chunk.lse.to(torch.float32)
        outside[:, :, chunk.rows] = chunk.outside.squeeze(-1).to(torch.float32)
    return out, lse, outside


@implements
def tail_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]; other wings need it, this one recomputes
    lse: Tensor,  # float32 [B, Hq, Tq]; likewise
    outside: Tensor,  # float32 [B, Hq, Tq]; likewise
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    kv_heads = key.shape[1]
    compute = torch.promote_types(query.dtype, torch.float32)
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = (
        key.new_zeros(key.shape, dtype=compute),
        value.new_zeros(value.shape, dtype=compute),
    )
    if query.numel() == 0 or key.shape[2] == 0:
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
    for chunk in _chunks(query, key, value, indices, rule):
        grads = grad_out[:, :, chunk.rows].to(compute)
        # The value of what is left out is the mean: dP = dO·v of the chosen, dO·mean of the others.
        of_tail = (grads * chunk.tail).sum(-1, keepdim=True)
        change = torch.where(chunk.chosen, products(grads, chunk.values), of_tail)
        change = change.masked_fill(~chunk.visible, 0.0)
        centre = (chunk.probabilities * change).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - grad_lse[:, :, chunk.rows].to(compute).unsqueeze(-1)
        grad_scores = (chunk.probabilities * (change - centre) * chunk.slopes).masked_fill(
            ~chunk.visible, 0.0
        )
        grad_query[:, :, chunk.rows] = weighted(grad_scores, chunk.visible, chunk.keys).to(query.dtype)
        grad_key += times_transposed(grad_scores, chunk.query, kv_heads)
        weights = chunk.kept + chunk.outside * chunk.mean
        grad_value += times_transposed(weights, grads, kv_heads)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def along(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    rule: PackedRule,
    tangents: SimpleNamespace,  # of query, key, value and sink_logits, each of its tensor's shape; None is 0
) -> tuple[Tensor, Tensor]:  # of out [B, Hq, Tq, Dv] and of lse float32 [B, Hq, Tq]
    """Forward mode of `tail_attention`; differentiable itself, and nothing is changed in place."""
    if query.shape[2] == 0 or key.shape[2] == 0:
        move = lse_along_nothing(query, tangents.sink_logits)
        return query.new_zeros((*query.shape[:3], value.shape[3])), move
    outs, lses = [], []
    for chunk in _chunks(query, key, value, indices, rule, look=False):
        moves = chunk.moves(tangents.query, tangents.key)
        lse = (chunk.probabilities * moves).sum(-1, keepdim=True)
        if rule.sink_logits is not None and tangents.sink_logits is not None:
            share = sink_share(rule.sink_logits.view(-1, 1, 1), chunk.lse.unsqueeze(-1))
            lse = lse + share * tangents.sink_logits.view(-1, 1, 1)
        change = chunk.probabilities * (moves - lse)
        outside = change.masked_fill(~chunk.left_out, 0.0).sum(-1, keepdim=True)
        out = weighted(change.masked_fill(~chunk.chosen, 0.0), chunk.chosen, chunk.values, False)
        out = out + torch.where(chunk.count > 0, outside * chunk.tail, 0.0)
        if tangents.value is not None:
            weights = chunk.kept + chunk.outside * chunk.mean
            out = out + weighted(weights, chunk.visible, tangents.value.to(chunk.keys.dtype), False)
        outs.append(out.to(query.dtype))
        lses.append(lse.squeeze(-1).to(torch.float32))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
