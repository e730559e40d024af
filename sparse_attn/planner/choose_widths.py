"""Which band each token lies in and how wide the bands are: what `plan_widths` makes a `WidthPlan` of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from sparse_attn.checks import describe, integer
from sparse_attn.planner import checks, rules
from sparse_attn.planner.bands import FILLED, Bands, smallest
from sparse_attn.planner.lagrange import lagrange

RULES = ("lagrange", "power", "mass")
# How fast the energies of a trained embedding's spectrum fall, σ_i² ∝ i^-β: docs/planner.md has the measurement.
BETA = 0.9
ALPHA = 0.3


def choose_widths(
    counts: Tensor | Sequence[float],
    embedding_dim: int,
    *,
    budget: int | None = None,
    ratio: float | None = None,
    num_bands: int = 4,
    rule: str = "lagrange",
    multiple_of: int = 8,
    beta: float = BETA,
    alpha: float = ALPHA,
) -> tuple[tuple[int, ...], Tensor]:
    """(width of each band, int32 [V] band of each token), arguments and errors as in `plan_widths`."""
    dim = int(integer("embedding_dim", embedding_dim, 1))
    values = checks.counts_of(counts)
    num_bands = int(integer("num_bands", num_bands, 1))
    multiple_of = int(integer("multiple_of", multiple_of, 1))
    beta = checks.real("beta", beta, 0, 4, above=True)
    alpha = checks.real("alpha", alpha, 0, 1)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {describe(rule)}")
    full = len(values) * dim
    limit = checks.budget_of(budget, ratio, full)
    order = numpy.argsort(-values, kind="stable")
    bands = _bands(values[order], dim, limit, num_bands, rule, multiple_of, beta, alpha)
    token_band = numpy.empty(len(order), dtype=numpy.int32)
    token_band[order] = numpy.repeat(numpy.arange(len(bands.sizes), dtype=numpy.int32), bands.sizes)
    return bands.widths, torch.from_numpy(token_band)


def _bands(
    counts: numpy.ndarray,
    dim: int,
    limit: int,
    num_bands: int,
    rule: str,
    multiple_of: int,
    beta: float,
    alpha: float,
) -> Bands:
    if limit >= len(counts) * dim:
        return Bands((len(counts),), (dim,), dim)
    least = smallest(len(counts), dim, multiple_of)
    if limit < least.parameters:
        raise ValueError(
            f"the budget must be at least {least.parameters:,} parameters, the smallest plan of {len(counts):,} "
            f"tokens for embedding_dim={dim} with widths in multiples of {multiple_of}, got {limit:,}"
        )
    num_bands = min(num_bands, len(counts))
    found = None
    if rule == "mass":
        found = rules.mass(counts, dim, limit, num_bands, multiple_of)
    elif rule == "power":
        found = rules.power(counts, dim, limit, num_bands, multiple_of, alpha)
    if found is None or found.parameters < FILLED * limit:
        other = lagrange(counts, dim, limit, num_bands, multiple_of, beta)
        if other is not None and (found is None or other.parameters >= FILLED * limit):
            found = other
    return found or least
