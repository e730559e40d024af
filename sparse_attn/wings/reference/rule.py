"""What a rule means, in plain PyTorch: which keys are visible, which are always kept, and which are best."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule


class VisibleKeys:
    """The keys that some queries see, and which of them they always keep.

    With blocks [B, G, N, M] of `block_size` keys, one row for each tile of `query_tile` queries, the keys of the
    tile's blocks alone, and those that are always kept.
    """

    def __init__(
        self,
        key: Tensor,  # [B, Hkv, Tk, D]
        rule: PackedRule,
        blocks: Tensor | None = None,  # int32 [B, G, N, M]
        block_size: int = 1,
        query_tile: int = 1,
    ) -> None:
        self.rule, self.shape = rule, (key.shape[0], rule.groups)
        self.positions = torch.arange(key.shape[2], device=key.device)  # [Tk]
        self.exists = None  # [B, 1, 1, Tk]
        if rule.key_lengths is not None:
            self.exists = self.positions < rule.key_lengths.view(-1, 1, 1, 1)
        self.starts = None  # int64 [B, 1, Tq, 1]
        if rule.key_starts is not None:
            starts = rule.key_starts.to(torch.int64).clamp(0, key.shape[2])  # sums of them fit
            self.starts = starts[:, None, :, None]
        self.blocks, self.block_size, self.query_tile = blocks, block_size, query_tile

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(visible, forced), bool [B, G, t, Tk] each, of some queries."""
        rule, device = self.rule, self.positions.device
        queries = torch.arange(rows.start, rows.stop, device=device)
        shape = (*self.shape, rows.stop - rows.start, self.positions.shape[0])
        visible = torch.ones(shape, dtype=torch.bool, device=device)
        first = 0 if self.starts is None else self.starts[:, :, rows]
        forced = (self.positions < first + rule.sinks).expand_as(visible)
        if self.starts is not None:
            visible = visible & (self.positions >= first)
        if rule.is_causal:
            last = queries.unsqueeze(-1) + rule.causal_offset  # [t, 1]
            visible = visible & (self.positions <= last)
            forced = forced | (self.positions > last - rule.window)
        if self.exists is not None:
            visible = visible & self.exists
        if rule.attn_mask is not None:
            visible = visible & rule.attn_mask[:, :, rows]
        if self.blocks is not None:
            visible = visible & (self._in_blocks(self.blocks, queries) | forced)
        return visible, forced & visible

    def _in_blocks(self, blocks: Tensor, queries: Tensor) -> Tensor:
        """bool [B, G, t, Tk]."""
        count = -(-self.positions.shape[0] // self.block_size)
        rows = blocks[:, :, queries // self.query_tile]  # [B, G, t, M]
        rows = torch.where((rows >= 0) & (rows < count), rows, count).to(torch.int64)
        chosen = torch.zeros((*rows.shape[:3], count + 1), dtype=torch.bool, device=rows.device)
        chosen.scatter_(-1, rows, torch.ones_like(rows, dtype=torch.bool))
        return chosen[..., self.positions // self.block_size]


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


def attention_mass(scores: Tensor, visible: Tensor) -> Tensor:
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
