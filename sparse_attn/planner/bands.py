"""Bands of tokens ranked by frequency: what they cost, and how the last of a budget is spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy

FILLED = 0.97  # a plan that uses this share of its budget is taken as filling it


@dataclass(frozen=True)
class Bands:
    """Band b holds the next `sizes[b]` tokens by rank, `widths[b]` wide; widths descend strictly, no band is empty."""

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    dim: int  # the model's width D

    @property
    def parameters(self) -> int:
        """Numbers in the tables, and in the projections of the bands that are narrower than D."""
        return sum(
            size * width + (self.dim * width if width != self.dim else 0)
            for size, width in zip(self.sizes, self.widths, strict=True)
        )


def tidy(sizes: Iterable[int], widths: Iterable[int], dim: int) -> Bands:
    """Without empty bands, equal neighbours in one, and no band that would be smaller at the full width.

    The last happens to a few frequent tokens: n rows of width w and their projection, (n + D) w numbers, are more
    than the n D of full rows unless n is large.
    """
    kept: list[list[int]] = []
    for size, width in zip(sizes, widths, strict=True):
        size, width = int(size), int(width)
        if size == 0:
            continue
        if all(w == dim for _, w in kept) and (size + dim) * width >= size * dim:
            width = dim
        if kept and kept[-1][1] == width:
            kept[-1][0] += size
        else:
            kept.append([size, width])
    return Bands(tuple(size for size, _ in kept), tuple(width for _, width in kept), dim)


def fill(bands: Bands, budget: int, counted: int) -> Bands:
    """Moves tokens over the bands' boundaries into the wider band, most frequent first, until the budget is spent.

    The boundary that has to move least, relative to its rank, goes first. `counted` is the number of tokens that
    occur at all: tokens that never do are moved only where 97 % cannot be reached otherwise.
    """
    for floor in (counted, sum(bands.sizes)):
        while floor == counted or bands.parameters < FILLED * budget:
            left = budget - bands.parameters
            ends = numpy.cumsum(bands.sizes)
            moves = []
            for b in range(len(bands.sizes) - 1):
                step = bands.widths[b] - bands.widths[b + 1]
                # The narrower band keeps a token, or it would be gone; that case comes below.
                room = min(bands.sizes[b + 1] - 1, floor - int(ends[b]))
                tokens = min(left // step, room)
                if tokens > 0:
                    moves.append((tokens / int(ends[b]), b, tokens))
            if not moves:
                break
            _, b, tokens = min(moves)
            sizes = list(bands.sizes)
            sizes[b] += tokens
            sizes[b + 1] -= tokens
            bands = tidy(sizes, bands.widths, bands.dim)
    return _absorb(bands, budget, counted)


def _absorb(bands: Bands, budget: int, counted: int) -> Bands:
    """Joins a band to the wider one before it where the budget allows; its projection then is spent on rows."""
    for b in range(len(bands.sizes) - 1):
        sizes = list(bands.sizes)
        sizes[b] += sizes[b + 1]
        del sizes[b + 1]
        joined = tidy(sizes, [w for i, w in enumerate(bands.widths) if i != b + 1], bands.dim)
        if bands.parameters < joined.parameters <= budget:
            return fill(joined, budget, counted)
    return bands


def token_weights(counts: numpy.ndarray) -> numpy.ndarray:
    """The share of each token, [V], sum 1. One that never occurred still may: last in line, but not worth nothing."""
    seen = counts[counts > 0]
    if len(seen) == 0:
        return numpy.full(len(counts), 1.0 / len(counts))
    weights = numpy.where(counts > 0, counts, 1e-3 * seen.min())
    return weights / weights.sum()


def width_grid(dim: int, multiple_of: int) -> list[int]:
    """The widths a band may have, ascending: the multiples below D, and D itself, multiple or not."""
    return [*range(multiple_of, dim, multiple_of), dim]


def smallest(num_tokens: int, dim: int, multiple_of: int) -> Bands:
    """The plan of fewest parameters: one band, the narrowest, unless a full table is smaller still."""
    return tidy([num_tokens], [width_grid(dim, multiple_of)[0]], dim)
