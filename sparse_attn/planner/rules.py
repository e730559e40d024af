"""The rules that fix the bands first, and then scale a profile of widths until the budget is spent.

"mass"   bands by cumulative share of the occurrences: the tokens that make up the first 80 % of a text, the next
         15 %, the next 4 %, … ; widths fall by a factor of 4 from band to band, as in adaptive input
         representations (Baevski and Auli, 2019).
"power"  widths proportional to p^α, p a band's mean frequency: mixed-dimension embeddings (Ginart et al., 2019).
         The bands cut the range of log p into equal parts.
"""

from __future__ import annotations

import numpy

from sparse_attn.planner.bands import Bands, fill, tidy, width_grid

FACTOR = 4.0  # of the widths of neighbouring bands, rule "mass"
SHARES = (
    0.80,
    0.95,
    0.99,
    0.998,
    0.9995,
)  # cumulative; past these each band leaves a fifth of what the last one left
SCALES = 4000  # scales tried: neighbours differ by a third of a per cent


def mass(counts: numpy.ndarray, dim: int, budget: int, num_bands: int, multiple_of: int) -> Bands | None:
    """The rule "mass"; `counts` [V] descend. None if no scale fits."""
    shares = list(SHARES[: num_bands - 1])
    while len(shares) < num_bands - 1:
        shares.append(1 - (1 - shares[-1]) / 5)
    cumulative = numpy.cumsum(_weights(counts))
    # A band ends with the token that reaches its share.
    ends = numpy.searchsorted(cumulative / cumulative[-1], numpy.array(shares) - 1e-12) + 1
    profile = FACTOR ** -numpy.arange(num_bands)
    return _scaled(counts, ends, profile, dim, budget, multiple_of)


def power(
    counts: numpy.ndarray, dim: int, budget: int, num_bands: int, multiple_of: int, alpha: float
) -> Bands | None:
    """The rule "power"; `counts` [V] descend. None if no scale fits."""
    weights = _weights(counts)
    seen = weights[weights > 0]
    cuts = numpy.linspace(numpy.log(seen[0]), numpy.log(seen[-1]), num_bands + 1)[1:-1]
    ends = numpy.searchsorted(-numpy.log(seen), -cuts)
    edges = numpy.concatenate([[0], ends, [len(weights)]])
    sizes = numpy.maximum(numpy.diff(edges), 1)
    sums = numpy.add.reduceat(numpy.append(weights, 0.0), edges[:-1]) * (numpy.diff(edges) > 0)
    profile = (sums / sizes) ** alpha
    # The last band may hold many tokens that never occur, and an empty one has no mean: descend all the same.
    profile = numpy.minimum.accumulate(numpy.where(numpy.diff(edges) > 0, profile, profile.max()))
    return _scaled(counts, ends, profile / profile[0], dim, budget, multiple_of)


def _weights(counts: numpy.ndarray) -> numpy.ndarray:
    return counts if counts[0] > 0 else numpy.ones_like(counts)


def _scaled(
    counts: numpy.ndarray,
    ends: numpy.ndarray,
    profile: numpy.ndarray,
    dim: int,
    budget: int,
    multiple_of: int,
) -> Bands | None:
    """Bands that end at these ranks, with widths in these proportions, as wide as the budget allows."""
    total = len(counts)
    ends = numpy.maximum.accumulate(numpy.clip(ends, 0, total))
    sizes = numpy.diff(numpy.concatenate([[0], ends, [total]]))
    grid = numpy.array(width_grid(dim, multiple_of))
    scales = numpy.geomspace(grid[0], dim / profile[profile > 0].min(), SCALES)
    wanted = numpy.minimum(scales[:, None] * profile, dim)
    # Down to the grid: the widest of it that is not above what is wanted, and at least the narrowest.
    widths = grid[numpy.maximum(numpy.searchsorted(grid, wanted, side="right") - 1, 0)]
    best: Bands | None = None
    for row in numpy.unique(widths, axis=0):
        bands = tidy(sizes, row, dim)
        if bands.parameters <= budget and (best is None or bands.parameters > best.parameters):
            best = bands
    return best and fill(best, budget, int(numpy.count_nonzero(counts)) or total)
