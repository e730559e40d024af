"""What the variable-width embedding and its loss are measured on, and what the field writes instead of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.bench import token_ids
from sparse_attn.bench.registry import Op

VOCABULARY, DIM = 50257, 512
BAND_SIZES, WIDTHS = (2000, 8000, 40257), (512, 128, 32)
KINDS = ("real", "zipf")


@dataclass(frozen=True)
class BandCase:
    """One call: which token ids, what is timed. `kept`: with an allocator that keeps freed memory."""

    op: str
    ids: str
    direction: str = "forward"
    kept: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        what = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}[self.direction]
        return f"{self.op} {self.ids} ids {what}{self.remarks}"

    @property
    def remarks(self) -> str:
        """What sets it apart from the case of the same ids and direction, to be put behind those."""
        kept = ", memory kept" if self.kept else ""
        return kept if self.dtype == "float32" else f"{kept}, {self.dtype}"


@dataclass(frozen=True)
class Bands:
    """One embedding and some ids.

    Rows are by rank within each band; `ranks` are the ids in order of frequency, which the rivals' bands need.
    """

    ids: Tensor  # [N]
    ranks: Tensor  # [N]
    order: Tensor  # [V]: the token of each rank
    tables: tuple[Tensor, ...]  # [n_b, width_b]
    projections: tuple[Tensor, ...]  # [D, width_b] of the bands but the first, whose width is D
    token_band: Tensor  # int32 [V]
    token_row: Tensor  # int32 [V]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(t) for t in self.tables)

    @property
    def dim(self) -> int:
        return self.tables[0].shape[1]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.tables, *self.projections)

    def split(self, leaves: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(tables, projections) as the public functions take them."""
        count = len(self.tables)
        return tuple(leaves[:count]), (None, *leaves[count:])

    def dense(self, leaves: tuple[Tensor, ...]) -> Tensor:
        """The table [V, D] by token id."""
        parts = zip(*self.split(leaves), strict=True)
        by_rank = torch.cat([t if p is None else t @ p.t() for t, p in parts])
        return torch.empty_like(by_rank).index_copy(0, self.order, by_rank)


def by_zipf(
    count: int,
    sizes: tuple[int, ...] = BAND_SIZES,
    widths: tuple[int, ...] = WIDTHS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Bands:
    """Ids by Zipf's law, tokens named at random."""
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = sum(sizes)
    weights = 1 / (torch.arange(vocabulary, device=device) + 2.7)
    names = torch.randperm(vocabulary, generator=generator, device=device)
    ids = names[torch.multinomial(weights, count, replacement=True, generator=generator)]
    counts = torch.empty(vocabulary, device=device).index_copy(0, names, weights)
    return _made(ids, counts, sizes, widths, dtype, generator)


def _made(ids, counts, sizes, widths, dtype, generator) -> Bands:
    device = ids.device
    order = counts.argsort(descending=True, stable=True)
    places = torch.arange(len(order), device=device)
    rank = torch.empty_like(order).index_copy(0, order, places)
    count = torch.tensor(sizes, device=device)
    band = torch.repeat_interleave(torch.arange(len(sizes), device=device), count)[rank]
    row = rank - (count.cumsum(0) - count)[band]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tables = tuple(draw(n, w).to(dtype) for n, w in zip(sizes, widths, strict=True))
    projections = tuple((draw(widths[0], w) / w**0.5).to(dtype) for w in widths[1:])
    return Bands(ids.contiguous(), rank[ids], order, tables, projections, band.int(), row.int())


@lru_cache(maxsize=2)
def make(kind: str, count: int) -> Bands:
    """The embedding of the benchmarks, float32, with `count` ids."""
    if kind == "zipf":
        return by_zipf(count)
    text = torch.tensor(token_ids.gpt2_tokens())
    start = (len(text) - count) // 2
    counts = torch.bincount(text, minlength=VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    return _made(text[start : start + count], counts, BAND_SIZES, WIDTHS, torch.float32, generator)


class BandOp(Op):
    """An op of ids and bands."""

    suite = "widths"

    def inputs_problem(self, case: BandCase) -> str | None:
        reason = token_ids.problem() if case.ids == "real" else None
        return None if reason is None else f"real ids: {reason}"

    def cases(self) -> list[BandCase]:
        return [BandCase(self.name, kind, direction) for kind in KINDS for direction in ("forward", "both")]


# ---- what one writes without it -----------------------------------------------------------------------------


def eager(bands: Bands, *leaves: Tensor) -> Tensor:
    """Adaptive input as fairseq and others write it: mask, lookup, projection and assignment per band."""
    out, low = leaves[0].new_zeros(len(bands.ranks), bands.dim), 0
    for table, projection in zip(*bands.split(leaves), strict=True):
        inside = (bands.ranks >= low) & (bands.ranks < low + len(table))
        if inside.any():
            rows = F.embedding(bands.ranks[inside] - low, table)
            out[inside] = rows if projection is None else F.linear(rows, projection)
        low += len(table)
    return out


def all_bands(bands: Bands, *leaves: Tensor) -> Tensor:
    """The same without sizes that depend on the ids, so that it compiles to one graph."""
    out, low = leaves[0].new_zeros(len(bands.ranks), bands.dim), 0
    for table, projection in zip(*bands.split(leaves), strict=True):
        inside = (bands.ranks >= low) & (bands.ranks < low + len(table))
        rows = F.embedding((bands.ranks - low).clamp(0, len(table) - 1), table)
        rows = rows if projection is None else F.linear(rows, projection)
        out = torch.where(inside.unsqueeze(1), rows, out)
        low += len(table)
    return out
