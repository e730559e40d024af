"""Definition of `block_tail` and of its gradient: attention to the means of whole blocks, each by how many keys of it
are left out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.gathered_attention import cap_slopes, softmax
from sparse_attn.wings.reference.rule import FAR, capped
from sparse_attn.wings.reference.tail_attention import times_transposed, weighted
from sparse_attn.wings.reference.topk_select import products
from sparse_attn.wings.reference.wing import implements


def visible_ranges(query: Tensor, key_length: int, rule: PackedRule) -> tuple[Tensor, Tensor]:
    """The first visible key of each query and the one behind the last, int64 [B, Tq] each; there is no mask."""
    shape = query.shape[0], query.shape[2]
    end = torch.full(shape, key_length, dtype=torch.int64, device=query.device)
    if rule.key_lengths is not None:
        end = torch.minimum(end, rule.key_lengths.to(torch.int64).unsqueeze(-1))
    if rule.is_causal:
        offset: int | Tensor = rule.causal_offset
        if rule.causal_offsets is not None:
            offset = rule.causal_offsets.to(torch.int64).clamp(-FAR, FAR)
        end = torch.minimum(end, torch.arange(1, shape[1] + 1, device=query.device) + offset)
    end = end.clamp(min=0)
    if rule.key_starts is None:
        return torch.zeros_like(end), end
    return torch.minimum(rule.key_starts.to(torch.int64).clamp(min=0), end), end


class _Chunk:
    """Some queries beside the means of all blocks, as they are computed with."""

    def __init__(
        self, rows: slice, query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, key_length: int,
        block: int, rule: PackedRule, seen: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        heads, blocks = query.shape[1], keys.shape[2]
        self.rows, self.query, self.keys, self.values = rows, query[:, :, rows].to(keys.dtype), keys, values
        begin, end = (places[:, None, rows, None] for places in seen)  # [B, 1, t, 1]
        first = torch.arange(blocks, device=query.device) * block
        whole = (first >= begin) & (first + block <= end)  # [B, 1, t, M]
        chosen = indices[:, :, rows]
        filled = (chosen >= 0) & (chosen < key_length)
        # Each key once: marks, then how many there are in a block.
        marks = chosen.new_zeros((*chosen.shape[:3], key_length + 1), dtype=torch.bool)
        places = torch.where(filled, chosen, key_length).to(torch.int64)
        marks = marks.scatter(-1, places, torch.ones_like(places, dtype=torch.bool))[..., : blocks * block]
        left = block - marks.unflatten(-1, (blocks, block)).sum(-1)  # [B, G, t, M]
        left = torch.where(whole, left, 0).repeat_interleave(heads // indices.shape[1], dim=1)
        self.counted = left > 0  # [B, Hq, t, M]
        scores = capped(products(self.query, keys) * rule.scale, rule.softcap)
        logits = torch.where(self.counted, scores + left.clamp(min=1).to(keys.dtype).log(), -torch.inf)
        self.probabilities, self.lse = softmax(logits, None)
        self.slopes = cap_slopes(torch.where(self.counted, scores, 0.0), rule.softcap) * rule.scale

    def moves(self, query_move: Tensor | None, key_move: Tensor | None) -> Tensor:
        moves = torch.zeros_like(self.probabilities)
        if query_move is not None:
            moves = moves + products(query_move[:, :, self.rows].to(self.keys.dtype), self.keys)
        if key_move is not None:
            moves = moves + products(self.query, key_move.to(self.keys.dtype))
        return (moves * self.slopes).masked_fill(~self.counted, 0.0)


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, key_length: int, block: int, rule: PackedRule
) -> Iterator[_Chunk]:
    compute = torch.promote_types(query.dtype, torch.float32)
    keys, values = key.to(compute), value.to(compute)
    seen = visible_ranges(query, key_length, rule)
    for rows in query_chunks(
        query.shape[2], query.shape[0] * query.shape[1] * (8 * key.shape[2] + key_length)
    ):
        yield _Chunk(rows, query, keys, values, indices, key_length, block, rule, seen)


@implements
def block_tail(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]: means of blocks
    value: Tensor,  # [B, Hkv, M, Dv]: likewise
    indices: Tensor,  # int32 [B, G, Tq, K]: keys
    key_length: int,
    block_size: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or key.shape[2] == 0:
        return out, lse
    for chunk in _chunks(query, key, value, indices, key_length, block_size, rule):
        out[:, :, chunk.rows] = weighted(chunk.probabilities, chunk.counted, chunk.values).to(out.dtype)
        lse[:, :, chunk.rows] = chunk.lse.to(torch.float32)
    return out, lse


@implements
def block_tail_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]; other wings need it, this one recomputes
    lse: Tensor,  # float32 [B, Hq, Tq]; likewise
    key_length: int,
    block_size: int,
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
    for chunk in _chunks(query, key, value, indices, key_length, block_size, rule):
        grads = grad_out[:, :, chunk.rows].to(compute)
        change = products(grads, chunk.values).masked_fill(~chunk.counted, 0.0)
        centre = (chunk.probabilities * change).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - grad_lse[:, :, chunk.rows].to(compute).unsqueeze(-1)
        grad_scores = (chunk.probabilities * (change - centre) * chunk.slopes).masked_fill(
            ~chunk.counted, 0.0
        )
        grad_query[:, :, chunk.rows] = weighted(grad_scores, chunk.counted, chunk.keys).to(query.dtype)
        grad_key += times_transposed(grad_scores, chunk.query, kv_heads)
        grad_value += times_transposed(chunk.probabilities, grads, kv_heads)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def along(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    key_length: int,
    block_size: int,
    rule: PackedRule,
    tangents: SimpleNamespace,  # of query, key and value, each of its tensor's shape; None is 0
) -> tuple[Tensor, Tensor]:  # of out [B, Hq, Tq, Dv] and of lse float32 [B, Hq, Tq]
    """Forward mode of `block_tail`; differentiable itself, and nothing is changed in place."""
    if query.shape[2] == 0 or key.shape[2] == 0:
        return query.new_zeros((*query.shape[:3], value.shape[3])), query.new_zeros(query.shape[:3]).float()
    outs, lses = [], []
    for chunk in _chunks(query, key, value, indices, key_length, block_size, rule):
        moves = chunk.moves(tangents.query, tangents.key)
        lse = (chunk.probabilities * moves).sum(-1, keepdim=True)
        out = weighted(chunk.probabilities * (moves - lse), chunk.counted, chunk.values, False)
        if tangents.value is not None:
            moved = tangents.value.to(chunk.keys.dtype)
            out = out + weighted(chunk.probabilities, chunk.counted, moved, False)
        outs.append(out.to(query.dtype))
        lses.append(lse.squeeze(-1).to(torch.float32))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
