"""Definition of `topk_select`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_attn.wings.reference.chunks import query_chunks


def topk_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    attn_mask: Tensor | None,  # bool [B, G, Tq, Tk], True = may attend
    key_lengths: Tensor | None,  # int [B]
    top_k: int,
    is_causal: bool,
    causal_offset: int,
    scale: float,
    window: int,
    sinks: int,
    groups: int,  # G: 1, Hkv or Hq
) -> Tensor:  # int32 [B, G, Tq, K]
    compute = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(compute)

    def scores(rows: slice) -> Tensor:
        return products(query[:, :, rows].to(compute), keys) * scale

    return select(
        scores, query, key, attn_mask, key_lengths, top_k, is_causal, causal_offset, window, sinks, groups
    )


def products(query: Tensor, key: Tensor) -> Tensor:
    """q·k: query [B, Hq, t, D], key [B, Hkv, Tk, D] → [B, Hq, t, Tk]."""
    query = query.unflatten(1, (key.shape[1], -1))
    return (query @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def select(
    scores: Callable[[slice], Tensor],  # of some queries, [B, Hq, t, Tk]
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    top_k: int,
    is_causal: bool,
    causal_offset: int,
    window: int,
    sinks: int,
    groups: int,
) -> Tensor:  # int32 [B, G, Tq, K]
    """The best of each row of scores, or of their attention mass where heads share."""
    batch, heads, query_length = query.shape[:3]
    key_length = key.shape[2]
    budget = min(top_k, key_length)
    indices = query.new_empty((batch, groups, query_length, budget), dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    rule = Visibility(key, attn_mask, key_lengths, is_causal, causal_offset, window, sinks, groups)
    for rows in query_chunks(query_length, batch * heads * key_length):
        tile = scores(rows)
        visible, forced = rule.of(rows)
        if groups < heads:
            tile = _mass(tile.unflatten(1, (groups, heads // groups)), visible)
        indices[:, :, rows] = best_of(tile, visible, forced, budget)
    return indices


class Visibility:
    """Which keys a query may see, and which of them it always keeps."""

    def __init__(
        self,
        key: Tensor,  # [B, Hkv, Tk, D]
        attn_mask: Tensor | None,  # bool [B, G, Tq, Tk]
        key_lengths: Tensor | None,  # int [B]
        is_causal: bool,
        causal_offset: int,
        window: int,
        sinks: int,
        groups: int,
    ) -> None:
        self.shape = (key.shape[0], groups)
        self.positions = torch.arange(key.shape[2], device=key.device)  # [Tk]
        self.attn_mask, self.is_causal, self.causal_offset = attn_mask, is_causal, causal_offset
        self.window, self.sinks = window, sinks
        self.exists = None  # [B, 1, 1, Tk]
        if key_lengths is not None:
            self.exists = self.positions < key_lengths.view(-1, 1, 1, 1)

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(visible, forced), bool [B, G, t, Tk] each, of some queries."""
        shape = (*self.shape, rows.stop - rows.start, self.positions.shape[0])
        visible = torch.ones(shape, dtype=torch.bool, device=self.positions.device)
        forced = (self.positions < self.sinks).expand_as(visible)
        if self.is_causal:
            last = torch.arange(rows.start, rows.stop, device=self.positions.device) + self.causal_offset
            last = last.unsqueeze(-1)  # [t, 1]
            visible = visible & (self.positions <= last)
            forced = forced | (self.positions > last - self.window)
        if self.exists is not None:
            visible = visible & self.exists
        if self.attn_mask is not None:
            visible = visible & self.attn_mask[:, :, rows]
        return visible, forced & visible


def best_of(
    scores: Tensor,  # [B, G, t, Tk]
    visible: Tensor,  # bool, likewise
    forced: Tensor,  # bool, likewise, within the visible
    budget: int,
) -> Tensor:  # int32 [B, G, t, budget]
    """The forced keys and the best of the other visible ones, ascending, then −1."""
    rank = _rank(scores, visible, forced)
    # A stable descending sort gives ties to the smaller key index.
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    hidden = rank.shape[-1]
    best = torch.where(visible.gather(-1, best), best, hidden).sort(dim=-1).values
    return torch.where(best < hidden, best, -1).to(torch.int32)


def _mass(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax probability summed over the heads that share: scores [B, G, R, t, Tk] → [B, G, t, Tk].

    The normaliser skips NaN, so that a NaN marks its own key alone and that key is chosen first.
    """
    scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
    lse = scores.masked_fill(scores.isnan(), -torch.inf).logsumexp(-1, keepdim=True)
    probabilities = torch.where(lse > -torch.inf, (scores - lse).exp(), 0.0)
    return torch.where(scores.isnan(), scores, probabilities).sum(2)


def _rank(scores: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """An integer that orders keys: hidden < −inf < … < +inf < NaN < forced."""
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = (scores + 0.0).contiguous().view(integer)  # + 0.0 makes −0 equal to +0
    rank = torch.where(bits < 0, bits ^ limits.max, bits)
    rank = rank.masked_fill(scores.isnan(), limits.max - 1)
    return rank.masked_fill(forced, limits.max).masked_fill(~visible, limits.min)
