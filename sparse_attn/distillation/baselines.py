"""Choices of keys that need no learning or next to none: what a learned one has to beat.

Each is a function (name of the layer, its Heads, top_k) → int32 indices [B, G, T, K] of the package's contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sparse_attn.distillation.progress import Progress, length_of, reporting
from sparse_attn.distillation.teacher import Heads, attention_layers, observe
from sparse_attn.nn import Indexer, KeySelector
from sparse_attn.ops.topk_select import topk_select
from sparse_attn.wings.reference.chunks import query_chunks

Chooser = Callable[[str, Heads, int], Tensor]


def exact(name: str, heads: Heads, top_k: int) -> Tensor:
    """The keys of the largest q·k: the most attention mass that top_k keys can hold."""
    return topk_select(heads.query, heads.key, top_k, is_causal=True)


def recent(name: str, heads: Heads, top_k: int) -> Tensor:
    """The last top_k keys, the query's own among them."""
    batch, length, device = heads.query.shape[0], heads.query.shape[2], heads.query.device
    last = torch.arange(length, device=device, dtype=torch.int32).unsqueeze(1)  # [T, 1]
    slots = torch.arange(min(top_k, length), device=device, dtype=torch.int32)
    indices = (last - (len(slots) - 1)).clamp(min=0) + slots
    return indices.where(indices <= last, -1).expand(batch, 1, -1, -1)


def random(seed: int) -> Chooser:
    """Uniform among the keys that a query sees; the same for all heads, layers and texts."""

    def choose(name: str, heads: Heads, top_k: int) -> Tensor:
        batch, length = heads.query.shape[0], heads.query.shape[2]
        generator = torch.Generator().manual_seed(seed)

        def scores(rows: slice) -> Tensor:
            return torch.rand(1, rows.stop - rows.start, length, generator=generator)

        return _largest(scores, 1, length, top_k).to(heads.query.device).expand(batch, -1, -1, -1)

    return choose


def learned(selectors: Mapping[str, KeySelector]) -> Chooser:
    """The choice of the layer's KeySelector."""
    return lambda name, heads, top_k: selectors[name].select(heads.query, top_k)


def indexed(indexers: Mapping[str, Indexer]) -> Chooser:
    """The choice of the layer's Indexer."""
    return lambda name, heads, top_k: indexers[name].select(heads.hidden, top_k)


class Frequencies:
    """How much attention each head of each layer pays, on average, to a position and to a distance.

    The two best guesses that do not look at the query at all.

    Args:
        teacher: a model with TopKAttention layers.
        stream: batches of token ids, int64 [B, T], all of one T.
        progress: True for a progress bar, or a function called with (name, done, total or None, note).
    """

    def __init__(
        self, teacher: torch.nn.Module, stream: Iterable[Tensor], *, progress: Progress | bool | None = None
    ) -> None:
        self.by_position: dict[
            str, Tensor
        ] = {}  # float64 [H, T], mean mass of position j over queries that see it
        self.by_distance: dict[str, Tensor] = {}  # float64 [H, T], mean mass of the key d before the query
        queries = 0
        with reporting("count attention", length_of(stream), progress) as advance:
            for ids in stream:
                queries += ids.shape[0]
                for name, heads in observe(teacher, ids).layers.items():
                    self._add(name, heads)
                advance()
        if not queries:
            raise ValueError("stream must have at least one batch, got none")
        for name in attention_layers(teacher):
            # Position j and distance d are each seen by the T − j and T − d last queries of a text.
            length = self.by_position[name].shape[1]
            seen = queries * torch.arange(length, 0, -1, device=self.by_position[name].device)
            self.by_position[name] /= seen
            self.by_distance[name] /= seen

    def positions(self, name: str, heads: Heads, top_k: int) -> Tensor:
        """The positions that this head attends to most, of those that the query sees."""
        return self._choose(self.by_position[name], False, heads, top_k)

    def distances(self, name: str, heads: Heads, top_k: int) -> Tensor:
        """The distances at which this head attends most."""
        return self._choose(self.by_distance[name], True, heads, top_k)

    def _add(self, name: str, heads: Heads) -> None:
        head_count, length = heads.query.shape[1:3]
        for tables in (self.by_position, self.by_distance):
            if name not in tables:
                tables[name] = torch.zeros(head_count, length, dtype=torch.float64, device=heads.query.device)
            if tables[name].shape[1] != length:
                raise ValueError(
                    f"the batches of stream must have one length, got {length} and {tables[name].shape[1]}"
                )
        for rows in heads.blocks():
            mass = heads.scores(rows).softmax(-1).sum(0).double()  # [H, t, T]
            self.by_position[name] += mass.sum(1)
            distance = _distances(rows, length, mass.device).clamp(min=0)  # later keys have no mass
            self.by_distance[name].index_add_(1, distance.flatten(), mass.flatten(1))

    @staticmethod
    def _choose(table: Tensor, by_distance: bool, heads: Heads, top_k: int) -> Tensor:
        batch, head_count, length = heads.query.shape[:3]
        if length > table.shape[1]:
            raise ValueError(f"a text must be no longer than those counted ({table.shape[1]}), got {length}")

        def scores(rows: slice) -> Tensor:
            if not by_distance:
                return table[:, None, :length].expand(-1, rows.stop - rows.start, -1)
            return table[:, _distances(rows, length, table.device).clamp(min=0)]

        return _largest(scores, head_count, length, top_k).expand(batch, -1, -1, -1)


def _distances(rows: slice, length: int, device: torch.device) -> Tensor:
    """How far before each query each key lies, int64 [t, T]; negative for later keys."""
    positions = torch.arange(length, device=device)
    return positions[rows].unsqueeze(1) - positions


def _largest(scores: Callable[[slice], Tensor], groups: int, length: int, top_k: int) -> Tensor:
    """scores(rows) [G, t, T] → the top_k visible keys of each query, int32 [1, G, T, K], block by block."""

    def blocks() -> Iterator[Tensor]:
        for rows in query_chunks(length, groups * length):
            block = scores(rows)
            block = block.masked_fill(_distances(rows, length, block.device) < 0, -torch.inf)
            best = block.topk(min(top_k, length), dim=-1)
            ascending = best.indices.where(best.values > -torch.inf, length).sort(-1).values
            yield ascending.where(ascending < length, -1).to(torch.int32)

    return torch.cat(list(blocks()), dim=1).unsqueeze(0)
