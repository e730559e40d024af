"""Vocabularies in bands with random rows, and the dense head that computes the same logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Bands:
    """tables B × [n, width], projections B × ([D, width] or None), token_band and token_row int32 [V]."""

    tables: list[Tensor]
    projections: list[Tensor | None]
    token_band: Tensor
    token_row: Tensor

    @property
    def vocabulary(self) -> int:
        return len(self.token_band)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.tables, *(p for p in self.projections if p is not None)]

    def with_parameters(self, parameters) -> Bands:
        """The same vocabulary with other numbers, in the order of `parameters`."""
        parameters = list(parameters)
        tables, rest = parameters[: len(self.tables)], iter(parameters[len(self.tables) :])
        projections = [None if p is None else next(rest) for p in self.projections]
        return Bands(tables, projections, self.token_band, self.token_row)

    def to(self, *arguments) -> Bands:
        moved = self.with_parameters(p.to(*arguments) for p in self.parameters)
        device = moved.tables[0].device
        return Bands(moved.tables, moved.projections, moved.token_band.to(device), moved.token_row.to(device))

    def dense(self) -> Tensor:
        """[V, D], with gradients."""
        rows = [t if p is None else t @ p.t() for t, p in zip(self.tables, self.projections, strict=True)]
        first = torch.tensor([0, *(len(t) for t in self.tables[:-1])]).cumsum(0)
        return torch.cat(rows)[first[self.token_band.long()] + self.token_row.long()]


def make(dim: int, sizes, widths, *, project_all: bool = False, seed: int = 0) -> Bands:
    """Float32 bands of tokens in random order; logits of N(0, 1) hidden states have about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    band = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    band = band[torch.randperm(len(band), generator=generator)]
    row = torch.empty_like(band)
    for b, size in enumerate(sizes):
        row[band == b] = torch.randperm(size, generator=generator)
    tables = [torch.randn(n, w, generator=generator) / w**0.5 for n, w in zip(sizes, widths, strict=True)]
    projections = [
        None if w == dim and not project_all else torch.randn(dim, w, generator=generator) / dim**0.5
        for w in widths
    ]
    return Bands(tables, projections, band.int(), row.int())


def dense_loss(
    hidden: Tensor,
    targets: Tensor,
    bands: Bands,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    **options,
) -> Tensor:
    """F.cross_entropy on the assembled logits, in hidden's dtype, z-loss added."""
    logits = hidden @ bands.dense().t()
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction, **options
    )
    if not z_loss:
        return loss
    active = targets != ignore_index
    penalty = torch.where(active, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction != "mean":
        return loss + (penalty if reduction == "none" else penalty.sum())
    return loss + penalty.sum() / (active.sum() if weight is None else weight[targets[active]].sum())


def value_and_gradients(loss, hidden: Tensor, bands: Bands) -> list[Tensor]:
    """[loss, d hidden, d tables …, d projections …] of loss(hidden, bands); an unreduced loss weighted unevenly."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, *bands.parameters)]
    value = loss(leaves[0], bands.with_parameters(leaves[1:]))
    upstream = torch.linspace(-0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    if value.dim() == 0:
        upstream = torch.ones_like(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]
