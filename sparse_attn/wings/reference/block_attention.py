"""Definition of `block_attention` and of its gradient: tiles of queries, each beside its own blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.gathered_attention import (
    add_rows,
    cap_slopes,
    lse_along_nothing,
    lse_of_nothing,
    sink_share,
    softmax,
)
from sparse_attn.wings.reference.rule import FAR, capped
from sparse_attn.wings.reference.wing import implements


@dataclass
class _Tiles:
    """Some tiles; U = max(G, Hkv) units of R heads that share keys and blocks, S queries and C keys per tile."""

    slice: slice
    rows: Tensor  # int64 [B, U, n, M]: blocks as rows of [B·Hkv·blocks, …], 0 where there is none
    filled: Tensor  # bool, likewise
    visible: Tensor  # bool [B, U, n, S, C]
    query: Tensor  # [B, U, n, R·S, D]
    key: Tensor  # [B, U, n, C, D]
    value: Tensor  # [B, U, n, C, Dv]

    def scores(self, rule: PackedRule) -> Tensor:
        """[B, U, n, R·S, C], −inf where a query does not see a key."""
        scores = capped((self.query @ self.key.mT) * rule.scale, rule.softcap)
        return scores.masked_fill(~self.seen(), -torch.inf)

    def seen(self) -> Tensor:
        share = self.query.shape[3] // self.visible.shape[3]
        return self.visible.repeat(1, 1, 1, share, 1)


class _TiledAttention:
    def __init__(
        self,
        query: Tensor,  # [B, Hq, Tq, D]
        key: Tensor,  # [B, Hkv, Tk, D]
        value: Tensor,  # [B, Hkv, Tk, Dv]
        blocks: Tensor,  # int32 [B, G, N, M]
        block_size: int,
        query_tile: int,
        rule: PackedRule,
    ) -> None:
        batch, heads, self.query_length = query.shape[:3]
        kv_heads, self.key_length = key.shape[1:3]
        self.units = max(blocks.shape[1], kv_heads)
        self.share = heads // self.units
        # Longer ones change nothing.
        self.size, self.tile = min(block_size, max(1, self.key_length)), min(query_tile, self.query_length)
        self.compute = torch.promote_types(query.dtype, torch.float32)
        self.rule = rule
        self.query, self.blocks = query, blocks.repeat_interleave(self.units // blocks.shape[1], dim=1)
        self.key, self.value = self.in_blocks(key), self.in_blocks(value)
        self.block_count = self.key.shape[0] // max(1, batch * kv_heads)
        self.limits = None if rule.key_lengths is None else rule.key_lengths.view(-1, 1, 1, 1, 1)
        self.starts = None  # [B, 1, N · S]: of the queries of all tiles
        if rule.key_starts is not None:
            self.starts = pad(rule.key_starts, (0, -self.query_length % max(1, self.tile))).unsqueeze(1)
        self.offsets = None  # likewise
        if rule.causal_offsets is not None:
            offsets = rule.causal_offsets.to(torch.int64).clamp(-FAR, FAR)
            self.offsets = pad(offsets, (0, -self.query_length % max(1, self.tile))).unsqueeze(1)
        base = torch.arange(batch, device=key.device).view(-1, 1) * kv_heads
        base = base + torch.arange(self.units, device=key.device) // (self.units // kv_heads)
        self.base = base.view(batch, self.units, 1, 1) * self.block_count
        self.sink = None if rule.sink_logits is None else self.of_heads(rule.sink_logits)

    def in_blocks(self, rows: Tensor) -> Tensor:
        """[B, H, T, D] → [B·H·blocks, block, D], zeros behind the last."""
        return pad(rows, (0, 0, 0, -rows.shape[2] % self.size)).reshape(-1, self.size, rows.shape[3])

    def of_heads(self, numbers: Tensor) -> Tensor:
        """[Hq] → [U, 1, R·S, 1]."""
        numbers = numbers.view(self.units, 1, self.share, 1, 1)
        return numbers.expand(-1, -1, -1, self.tile, -1).flatten(2, 3)

    def in_tiles(self, rows: Tensor, tiles: slice) -> Tensor:
        """[B, Hq, Tq, D] → [B, U, n, R·S, D] of some tiles, zeros behind the last query."""
        part = rows[:, :, tiles.start * self.tile : tiles.stop * self.tile].to(self.compute)
        part = pad(part, (0, 0, 0, -part.shape[2] % self.tile))
        part = part.unflatten(2, (-1, self.tile)).unflatten(1, (self.units, self.share))
        return part.transpose(2, 3).flatten(3, 4)

    def from_tiles(self, tiles: Tensor, rows: slice) -> Tensor:
        """[B, U, n, R·S, D] → [B, Hq, t, D], without what lies behind the last query."""
        heads = tiles.unflatten(3, (self.share, self.tile)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return heads[:, :, : min(rows.stop * self.tile, self.query_length) - rows.start * self.tile]

    def offset(self, tiles: slice) -> int | Tensor:
        """Of the queries of some tiles, where each has its own [B, 1, n, S, 1]."""
        if self.offsets is None:
            return self.rule.causal_offset
        return (
            self.offsets[..., tiles.start * self.tile : tiles.stop * self.tile]
            .unflatten(2, (-1, self.tile))
            .unsqueeze(-1)
        )

    def rows_of(self, tiles: slice) -> slice:
        return slice(tiles.start * self.tile, min(tiles.stop * self.tile, self.query_length))

    def chunks(self) -> Iterator[_Tiles]:
        count, slots = self.blocks.shape[2:]
        width = self.key.shape[2] + self.value.shape[2] + 4 * self.share * self.tile
        if self.query.numel() == 0 or slots == 0 or self.key_length == 0:
            return
        for tiles in query_chunks(count, self.query.shape[0] * self.units * slots * self.size * width):
            blocks = self.blocks[:, :, tiles]
            filled = (blocks >= 0) & (blocks < self.block_count)
            rows = torch.where(filled, self.base + blocks.to(torch.int64), 0)
            first = blocks.to(torch.int64).unsqueeze(-1) * self.size
            position = (first + torch.arange(self.size, device=first.device)).flatten(3)  # [B, U, n, C]
            visible = filled.repeat_interleave(self.size, dim=3) & (position < self.key_length)
            visible, position = visible.unsqueeze(3), position.unsqueeze(3)
            if self.limits is not None:
                visible = visible & (position < self.limits)
            queries = torch.arange(tiles.start * self.tile, tiles.stop * self.tile, device=first.device)
            queries = queries.view(-1, self.tile, 1)  # [n, S, 1]
            if self.rule.is_causal:
                visible = visible & (position <= queries + self.offset(tiles))
            if self.starts is not None:
                starts = self.starts[..., tiles.start * self.tile : tiles.stop * self.tile]
                visible = visible & (position >= starts.unflatten(2, (-1, self.tile)).unsqueeze(-1))
            visible = visible & (queries < self.query_length)
            # What no query of the tile sees must not reach a product: 0 · NaN is NaN.
            used = visible.any(3).unsqueeze(-1)
            key, value = (
                torch.where(used, t[rows].flatten(3, 4).to(self.compute), 0.0) for t in (self.key, self.value)
            )
            yield _Tiles(tiles, rows, filled, visible, self.in_tiles(self.query, tiles), key, value)


def _weighted(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """weights @ value in which 0 · NaN of keys that a query does not see counts as 0."""
    finite = value.isfinite()
    touched = seen.to(weights.dtype) @ (~finite).to(weights.dtype) > 0
    return torch.where(touched, weights @ value, weights @ torch.where(finite, value, 0.0))


@implements
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    query_tile: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    p = _TiledAttention(query, key, value, blocks, block_size, query_tile, rule)
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    lse = lse_of_nothing(query, rule.sink_logits)
    for tiles in p.chunks():
        probabilities, total = softmax(tiles.scores(rule), p.sink)
        rows = p.rows_of(tiles.slice)
        attended = _weighted(probabilities, tiles.value, tiles.seen())
        out[:, :, rows] = p.from_tiles(attended, tiles.slice).to(out.dtype)
        lse[:, :, rows] = p.from_tiles(total.unsqueeze(-1), tiles.slice).squeeze(-1).float()
    return out, lse


@implements
def block_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # [B, Hq, Tq]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    out: Tensor,  # [B, Hq, Tq, Dv]; other wings need both, this one recomputes
    lse: Tensor,  # [B, Hq, Tq]
    block_size: int,
    query_tile: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key and value
    p = _TiledAttention(query, key, value, blocks, block_size, query_tile, rule)
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = (
        t.new_zeros((t.shape[0], t[0].numel() if len(t) else 0), dtype=p.compute) for t in (p.key, p.value)
    )
    for tiles in p.chunks():
        rows = p.rows_of(tiles.slice)
        scores = tiles.scores(rule)
        probabilities, _ = softmax(scores, p.sink)
        grads = p.in_tiles(grad_out, tiles.slice)
        # dS = P ∘ (dO·Vᵀ − Σ P ∘ (dO·Vᵀ) + dLSE)
        grad_probabilities = torch.where(tiles.seen(), grads @ tiles.value.mT, 0.0)
        centre = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - p.in_tiles(grad_lse.unsqueeze(-1), tiles.slice)
        slopes = cap_slopes(scores, rule.softcap) * rule.scale
        grad_scores = torch.where(tiles.seen(), probabilities * (grad_probabilities - centre) * slopes, 0.0)
        grad_query[:, :, rows] = p.from_tiles(grad_scores @ tiles.key, tiles.slice).to(query.dtype)
        for total, terms in (
            (grad_key, grad_scores.mT @ tiles.query),
            (grad_value, probabilities.mT @ grads),
        ):
            terms = terms.unflatten(3, (-1, p.size)).flatten(4)  # [B, U, n, M, block · D]
            add_rows(total, tiles.rows, terms, tiles.filled)
    return grad_query, _from_blocks(grad_key, key), _from_blocks(grad_value, value)


def _from_blocks(total: Tensor, like: Tensor) -> Tensor:
    """[B·H·blocks, block · D] → [B, H, T, D]."""
    batch, heads, length, dim = like.shape
    if like.numel() == 0:
        return torch.zeros_like(like)
    return total.view(batch, heads, -1, dim)[:, :, :length].to(like.dtype)


def along(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    query_tile: int,
    rule: PackedRule,
    tangents: SimpleNamespace,  # of query, key, value and sink_logits, each of its tensor's shape; None is 0
) -> tuple[Tensor, Tensor]:  # of out [B, Hq, Tq, Dv] and of lse float32 [B, Hq, Tq]
    """Forward mode of `block_attention`; differentiable itself, and nothing is changed in place."""
    p = _TiledAttention(query, key, value, blocks, block_size, query_tile, rule)
    query_move, key_move, value_move = tangents.query, tangents.key, tangents.value
    outs = [query.new_zeros((*query.shape[:2], 0, value.shape[3]))]
    lses = [query.new_zeros((*query.shape[:2], 0), dtype=torch.float32)]
    for tiles in p.chunks():
        seen = tiles.seen()
        used = tiles.visible.any(3).unsqueeze(-1)

        def gathered(tensor: Tensor, tiles=tiles, used=used) -> Tensor:  # [B, U, n, C, D]
            return torch.where(used, p.in_blocks(tensor)[tiles.rows].flatten(3, 4).to(p.compute), 0.0)

        scores = tiles.scores(rule)
        probabilities, own = softmax(scores, p.sink)
        # dLSE = Σ P ∘ dS, dO = Σ P ∘ (dS − dLSE) · V + P · dV; of a sink V is 0
        moves = torch.zeros_like(probabilities)
        if query_move is not None:
            moves = moves + p.in_tiles(query_move, tiles.slice) @ tiles.key.mT
        if key_move is not None:
            moves = moves + tiles.query @ gathered(key_move).mT
        moves = torch.where(seen, moves * cap_slopes(scores, rule.softcap) * rule.scale, 0.0)
        lse = (probabilities * moves).sum(-1, keepdim=True)
        if p.sink is not None and tangents.sink_logits is not None:
            lse = lse + sink_share(p.sink, own.unsqueeze(-1)) * p.of_heads(tangents.sink_logits)
        out = _weighted(probabilities * (moves - lse), tiles.value, seen)
        if value_move is not None:
            out = out + _weighted(probabilities, gathered(value_move), seen)
        outs.append(p.from_tiles(out, tiles.slice).to(query.dtype))
        lses.append(p.from_tiles(lse, tiles.slice).squeeze(-1).to(torch.float32))
    if len(outs) == 1:
        nothing = query.new_zeros((*query.shape[:3], value.shape[3]))
        return nothing, lse_along_nothing(query, tangents.sink_logits)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
