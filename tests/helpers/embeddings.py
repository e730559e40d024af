"""Tables, projections and ids for the tests of the variable-width embedding, and its plain formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.planner import WidthPlan


@dataclass
class Tables:
    """One embedding: the arguments of the op, and the dense table that it stands for."""

    tables: list[Tensor]
    projections: list[Tensor | None]
    token_band: Tensor
    token_row: Tensor

    @property
    def arguments(self) -> tuple:
        return self.tables, self.projections, self.token_band, self.token_row

    @property
    def leaves(self) -> list[Tensor]:
        """What has gradients, the tables first."""
        return self.tables + [p for p in self.projections if p is not None]

    def require_grad(self) -> Tables:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self

    def to(self, dtype: torch.dtype) -> Tables:
        """New leaves of another dtype with the same values."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype, copy=True)

        tables, projections = [cast(t) for t in self.tables], [cast(p) for p in self.projections]
        return Tables(tables, projections, self.token_band, self.token_row)

    def sizes(self) -> Tables:
        """New leaves with the absolute values."""

        def size(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().abs()

        tables, projections = [size(t) for t in self.tables], [size(p) for p in self.projections]
        return Tables(tables, projections, self.token_band, self.token_row)

    def dense(self, padding_idx: int | None = None) -> Tensor:
        """The plain formula: the whole table [V, D], put together row by row."""
        full = [t if p is None else t @ p.t() for t, p in zip(self.tables, self.projections, strict=True)]
        starts = [sum(len(t) for t in self.tables[:b]) for b in range(len(full))]
        places = torch.tensor(starts)[self.token_band.long()] + self.token_row.long()
        table = torch.cat(full)[places]
        if padding_idx is not None:
            table = table * (torch.arange(len(table)) != padding_idx % len(table)).to(table.dtype)[:, None]
        return table


def make_tables(
    dim: int = 24,
    widths: tuple[int, ...] = (24, 10, 3),
    sizes: tuple[int, ...] = (20, 70, 110),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tables:
    """Bands of the given sizes, the tokens in no order."""
    generator = torch.Generator().manual_seed(seed)
    bands = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    bands = bands[torch.randperm(len(bands), generator=generator)]
    plan = WidthPlan(dim, widths, bands)
    tables = [torch.randn(n, w, generator=generator).to(dtype) for n, w in zip(sizes, widths, strict=True)]
    projections = [
        None if w == dim else (torch.randn(dim, w, generator=generator) / w**0.5).to(dtype) for w in widths
    ]
    return Tables(tables, projections, plan.token_band, plan.token_row)


def make_ids(kind: str, vocabulary: int, count: int, seed: int = 1) -> Tensor:
    """int64 [count]: zipf, uniform, or equal."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "equal":
        return torch.full((count,), vocabulary // 2)
    if kind == "uniform":
        return torch.randint(vocabulary, (count,), generator=generator)
    if kind == "zipf":
        weights = 1 / (torch.arange(vocabulary) + 2.7)
        ranks = torch.multinomial(weights, count, replacement=True, generator=generator)
        return torch.randperm(vocabulary, generator=generator)[ranks]
    raise ValueError(kind)
