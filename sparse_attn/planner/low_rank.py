"""A trained embedding table as bands of narrow rows: frequency-weighted truncated SVD, and what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.checks import FLOAT_DTYPES, describe, integer
from sparse_attn.planner import checks
from sparse_attn.planner.bands import token_weights
from sparse_attn.planner.width_plan import WidthPlan

CHUNK = 1 << 21  # numbers of a table that are converted at one time


@dataclass(frozen=True)
class BandError:
    """What one band loses; the errors are relative and squared, 0 (nothing) to 1 (everything)."""

    tokens: int
    width: int
    parameters: int
    share: float  # of all occurrences
    weighted: float | None  # Σ p_t ‖e_t − ê_t‖² / Σ p_t ‖e_t‖² over its tokens; None if none of them occurs
    plain: float  # the same with every token counted once


@dataclass(frozen=True)
class FactorizationReport:
    """What a factorization loses, per band and overall; print it for a table."""

    bands: tuple[BandError, ...]
    parameters: int
    full_parameters: int  # of the table that was factorized
    weighted: float | None  # as in BandError, over all tokens: the expected loss on text with these counts
    plain: float

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {**vars(self), "bands": [vars(band) for band in self.bands]}

    def __str__(self) -> str:
        rows = [("band", "tokens", "occurrences", "width", "parameters", "error", "error, unweighted")]
        for number, band in enumerate(self.bands):
            sizes = (f"{band.tokens:,}", f"{band.share:.1%}", str(band.width), f"{band.parameters:,}")
            rows.append((str(number), *sizes, _percent(band.weighted), _percent(band.plain)))
        tokens = sum(band.tokens for band in self.bands)
        sizes = (f"{tokens:,}", "", "", f"{self.parameters:,}")
        rows.append(("all", *sizes, _percent(self.weighted), _percent(self.plain)))
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.rjust(w) for c, w in zip(row, columns, strict=True)) for row in rows)
        head = (
            f"{self.full_parameters:,} parameters became {self.parameters:,} "
            f"({self.parameters / self.full_parameters:.1%}); error: relative, squared, weighted by frequency"
        )
        return "\n  ".join([head, *lines])


def factorize(
    table: Tensor, counts: Tensor | Sequence[float], plan: WidthPlan
) -> tuple[list[Tensor], list[Tensor | None], FactorizationReport]:
    """The tables and projections of `plan` that are closest to a full table, weighted by frequency.

    For each band b with rows E_b and shares p, minimises Σ_t p_t ‖e_t − P x_t‖² over the projection P [D, w] and the
    rows x_t: P holds the w leading eigenvectors of Σ_t p_t e_t e_tᵀ (the right singular vectors of diag(√p) E_b;
    Eckart and Young, 1936), and x_t = Pᵀ e_t. A band of full width is copied, exactly.

    Args:
        table: the full embedding [V, D], float32, float16, bfloat16 or float64, on any device.
        counts: how often each token occurs, [V]. Tokens that never occur weigh next to nothing.
        plan: a `WidthPlan` with num_embeddings V and embedding_dim D.

    Returns:
        `(tables, projections, report)`: tables[b] [n_b, width_b] and projections[b] [D, width_b] or None, in the dtype
        and on the device of `table`, without gradient; the columns of a projection are orthonormal.

    Raises:
        TypeError, ValueError: shapes that do not agree, counts that are negative or not finite, a table with NaN or
            inf.

    Example::

        >>> plan = WidthPlan.from_cutoffs(100, 16, cutoffs=[10], widths=[16, 4])
        >>> tables, projections, report = factorize(torch.randn(100, 16), torch.ones(100), plan)
        >>> [tuple(t.shape) for t in tables], projections[0], tuple(projections[1].shape)
        ([(10, 16), (90, 4)], None, (16, 4))
    """
    if not isinstance(plan, WidthPlan):
        raise TypeError(f"plan must be a WidthPlan, got {describe(plan)}")
    values = checks.counts_of(counts)
    vocabulary, dim = _table(table, len(values))
    if (plan.num_embeddings, plan.embedding_dim) != (vocabulary, dim):
        raise ValueError(
            f"the plan must be for a table of shape {[vocabulary, dim]}, "
            f"got one for {[plan.num_embeddings, plan.embedding_dim]}"
        )
    table = table.detach()
    # MPS has no float64, and some devices no eigh: the CPU has both.
    device = table.device if table.device.type in ("cpu", "cuda") else torch.device("cpu")
    share = torch.from_numpy(values / (values.sum() or 1.0)).to(device)
    weight = torch.from_numpy(token_weights(values)).to(device)
    tables: list[Tensor] = []
    projections: list[Tensor | None] = []
    bands: list[BandError] = []
    sums = torch.zeros(4, dtype=torch.float64)  # lost and whole energy, weighted and plain
    for number, (size, width) in enumerate(zip(plan.band_sizes, plan.widths, strict=True)):
        tokens = plan.tokens_of(number)
        rows = table[tokens.to(table.device)]  # [n, D]
        tokens = tokens.to(device)
        narrow, projection = _fit(rows.to(device), weight[tokens], width)
        tables.append(narrow.to(table.device))
        projections.append(None if projection is None else projection.to(table.device))
        energies = _energies(rows.to(device), narrow, projection, share[tokens])
        sums += energies
        weighted, plain = _ratios(energies)
        cost = plan.band_parameters()[number]
        bands.append(BandError(size, width, cost, float(share[tokens].sum()), weighted, plain))
    weighted, plain = _ratios(sums)
    report = FactorizationReport(
        tuple(bands), plan.num_parameters(), vocabulary * dim, weighted=weighted, plain=plain
    )
    return tables, projections, report


def uniform_low_rank(
    table: Tensor, counts: Tensor | Sequence[float], num_parameters: int
) -> tuple[list[Tensor], list[Tensor | None], FactorizationReport]:
    """The fair baseline: one band of one width for all tokens, with at most `num_parameters` parameters.

    The rank is ⌊num_parameters / (V + D)⌋; the fit is weighted by frequency as in `factorize`, and so are the results.
    """
    vocabulary, dim = _table(table, len(checks.counts_of(counts)))
    num_parameters = int(integer("num_parameters", num_parameters, 1))
    rank = dim if num_parameters >= vocabulary * dim else min(num_parameters // (vocabulary + dim), dim - 1)
    if rank < 1:
        raise ValueError(
            f"num_parameters must be at least V + D = {vocabulary + dim}, a table of width 1, got {num_parameters}"
        )
    return factorize(table, counts, WidthPlan(dim, [rank], torch.zeros(vocabulary, dtype=torch.int32)))


def _table(table: object, num_counts: int) -> tuple[int, int]:
    if not isinstance(table, Tensor) or table.dtype not in FLOAT_DTYPES:
        raise TypeError(f"table must be a floating-point tensor of shape [V, D], got {describe(table)}")
    if table.dim() != 2 or table.shape[1] == 0:
        raise ValueError(f"table must have shape [V, D] with D at least 1, got {describe(table)}")
    if table.shape[0] != num_counts:
        raise ValueError(
            f"counts must have one entry per row of the table, {table.shape[0]}, got {num_counts}"
        )
    return table.shape[0], table.shape[1]


def _fit(rows: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """(narrow [n, w], projection [D, w] or None) in the dtype of rows [n, D]; weight float64 [n]."""
    dim = rows.shape[1]
    if width == dim:
        return rows.clone(), None
    step = max(1, CHUNK // dim)
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=rows.device)
    # Only ratios matter; a power of two keeps small weights in float32's range and rounds nothing.
    root = (weight / torch.exp2(weight.max().log2().ceil())).sqrt() if len(weight) else weight
    for part, w in zip(rows.split(step), root.split(step), strict=True):
        part = _wide(part)
        scaled = part * w.to(part.dtype)[:, None]
        gram += scaled.T @ scaled
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("table must be finite, got NaN or inf in it")
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]  # [D, w], the leading ones first
    # The sign of an eigenvector is arbitrary: its largest entry is made positive, on every machine alike.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    narrow = torch.empty(len(rows), width, dtype=rows.dtype, device=rows.device)
    for part, out in zip(rows.split(step), narrow.split(step), strict=True):
        part = _wide(part)
        out.copy_(part @ basis.to(part.dtype))
    return narrow, basis.to(rows.dtype)


def _wide(rows: Tensor) -> Tensor:
    """float64 stays, the rest becomes float32; what is summed over rows is summed in float64."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _energies(rows: Tensor, narrow: Tensor, projection: Tensor | None, share: Tensor) -> Tensor:
    """float64 [4] on the CPU: Σ p ‖e − ê‖², Σ p ‖e‖², Σ ‖e − ê‖², Σ ‖e‖², of what is returned, rounding included."""
    sums = torch.zeros(4, dtype=torch.float64, device=rows.device)
    step = max(1, CHUNK // rows.shape[1])
    for part, small, p in zip(rows.split(step), narrow.split(step), share.split(step), strict=True):
        part, small = _wide(part), _wide(small)
        lost = part - (small if projection is None else small @ _wide(projection).T)
        lost, whole = lost.square().sum(1).double(), part.square().sum(1).double()
        sums += torch.stack([p @ lost, p @ whole, lost.sum(), whole.sum()])
    return sums.cpu()


def _ratios(energies: Tensor) -> tuple[float | None, float]:
    lost, whole, plain_lost, plain_whole = energies.tolist()
    weighted = lost / whole if whole > 0 else None
    return weighted, plain_lost / plain_whole if plain_whole > 0 else 0.0


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{error:.2%}"
