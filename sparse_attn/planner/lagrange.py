"""The rule "lagrange": the bands and widths of least expected error under the budget.

With p_t the share of token t and err(w) the part of a row's energy that width w loses, minimise Σ_t p_t err(w_t)
subject to Σ_t w_t + D Σ_b w_b ≤ budget. For given widths w_1 > … > w_B the projections are a constant, and the
Lagrangian Σ_t [p_t err(w_t) + λ w_t] is minimal token by token: t lies above the boundary between w_b and w_{b+1} when

    p_t > λ (w_b − w_{b+1}) / (err(w_{b+1}) − err(w_b)).

err is convex, so the thresholds descend and the bands are runs of tokens by frequency; λ is found by bisection, and
solves the problem of these widths exactly up to one token per boundary. The widths themselves are searched: all
sets of one and two on a coarse grid, then one more width at a time, each time moving single widths while that helps.
"""

from __future__ import annotations

import itertools

import numpy

from sparse_attn.planner.bands import FILLED, Bands, fill, tidy, token_weights, width_grid

COARSE = 40  # widths in the grid on which pairs are tried
BISECTIONS = 48
TIE = 1e-6  # equal counts are taken in the order of their ranks, as if they fell by this much in all


def error_model(dim: int, beta: float) -> numpy.ndarray:
    """err(w) for w = 0 … D, [D + 1]: the tail of a spectrum of energies i^-β, from 1 down to 0."""
    energy = numpy.arange(1, dim + 1, dtype=numpy.float64) ** -beta
    tail = numpy.concatenate([numpy.cumsum(energy[::-1])[::-1], [0.0]])
    return tail / tail[0]


def lagrange(
    counts: numpy.ndarray, dim: int, budget: int, num_bands: int, multiple_of: int, beta: float
) -> Bands | None:
    """The best `Bands` found; `counts` [V] descend. None if no plan fits."""
    search = _Search(counts, dim, budget, error_model(dim, beta))
    grid = width_grid(dim, multiple_of)
    pairs = min(2, num_bands)
    for size in range(1, pairs + 1):
        search.offer(list(itertools.combinations(_thin(grid), size)))
    search.refine(grid)
    for _ in range(num_bands - pairs):
        before = search.best
        search.offer([_with(before, width) for width in grid if width not in before])
        if search.best == before:
            break
        search.refine(grid)
    return search.result()


def _thin(grid: list[int]) -> list[int]:
    """At most COARSE of the grid, the narrow ones closer together, both ends among them."""
    if len(grid) <= COARSE:
        return grid
    places = numpy.geomspace(1, len(grid), COARSE).round().astype(int) - 1
    return [grid[i] for i in sorted(set(places.tolist()))]


def _with(widths: tuple[int, ...], width: int) -> tuple[int, ...]:
    return tuple(sorted((*widths, width)))


class _Search:
    """The best set of widths (ascending) so far, among those offered."""

    def __init__(self, counts: numpy.ndarray, dim: int, budget: int, err: numpy.ndarray) -> None:
        self.dim, self.budget, self.err, self.total = dim, budget, err, len(counts)
        self.counted = int(numpy.count_nonzero(counts))
        if self.counted == 0:
            self.counted = self.total
        weights = token_weights(counts)
        self.mass = numpy.concatenate([[0.0], numpy.cumsum(weights)])
        # Ascending, for searchsorted.
        self.height = -numpy.log(weights) + TIE * numpy.arange(self.total) / self.total
        self.best: tuple[int, ...] = ()
        # (the budget is left unused, tokens that never occur are split, expected error): the less the better
        self.best_score = (True, True, numpy.inf)
        self.seen: set[tuple[int, ...]] = set()

    def offer(self, sets: list[tuple[int, ...]]) -> None:
        """Tries sets of ascending widths, all of one size."""
        sets = [widths for widths in sets if widths not in self.seen]
        self.seen.update(sets)
        if not sets:
            return
        widths = numpy.array(sets, dtype=numpy.int64)[:, ::-1]  # [N, B], descending
        ends = self._solve(widths)
        used = self._parameters(ends, widths)
        error = (numpy.diff(self.mass[ends], axis=1) * self.err[widths]).sum(1)
        error[(used > self.budget) | self._wasteful(ends, widths)] = numpy.inf
        unused = (used < FILLED * self.budget) | ~numpy.isfinite(error)
        split = numpy.any((ends > self.counted) & (ends < self.total), axis=1)
        first = numpy.lexsort((error, split, unused, ~numpy.isfinite(error)))[0]
        score = (bool(unused[first]), bool(split[first]), float(error[first]))
        if numpy.isfinite(score[2]) and score < self.best_score:
            self.best, self.best_score = sets[first], score

    def refine(self, grid: list[int]) -> None:
        """Moves one width at a time, near and far, as long as that helps."""
        place = {width: i for i, width in enumerate(grid)}
        steps = [sign * 2**k for k in range(len(grid).bit_length()) for sign in (-1, 1)]
        before = None
        while self.best != before:
            before = self.best
            moved = [
                before[:b] + (grid[place[width] + step],) + before[b + 1 :]
                for b, width in enumerate(before)
                for step in steps
                if 0 <= place[width] + step < len(grid)
            ]
            self.offer([widths for widths in moved if all(x < y for x, y in itertools.pairwise(widths))])

    def result(self) -> Bands | None:
        if not self.best:
            return None
        widths = numpy.array([self.best[::-1]])
        sizes = numpy.diff(self._solve(widths)[0])
        return fill(tidy(sizes, widths[0], self.dim), self.budget, self.counted)

    def _solve(self, widths: numpy.ndarray) -> numpy.ndarray:
        """Where each band ends by rank, [N, B + 1] from 0 to V, the budget spent as far as λ can."""
        gain = self.err[widths[:, 1:]] - self.err[widths[:, :-1]]  # [N, B - 1]
        slope = numpy.log(gain) - numpy.log(widths[:, :-1] - widths[:, 1:])
        count = len(widths)
        edges = numpy.zeros((count, widths.shape[1] + 1), dtype=numpy.int64)
        edges[:, -1] = self.total
        if widths.shape[1] == 1:
            return edges
        # height < slope + ν is "above the boundary"; ν = -ln λ grows, and the parameters with it.
        low = self.height[0] - slope.max(1) - 1.0
        high = self.height[-1] - slope.min(1) + 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            edges[:, 1:-1] = numpy.searchsorted(self.height, slope + middle[:, None])
            fits = self._parameters(edges, widths) <= self.budget
            low, high = numpy.where(fits, middle, low), numpy.where(fits, high, middle)
        edges[:, 1:-1] = numpy.searchsorted(self.height, slope + low[:, None])
        # Rounding may swap two thresholds that are as good as equal.
        edges = numpy.maximum.accumulate(edges, axis=1)
        # Tokens that never occur stay together in the narrowest band, if that fills the budget too.
        together = edges.copy()
        together[:, 1:-1] = numpy.minimum(together[:, 1:-1], self.counted)
        filled = self._parameters(together, widths) >= FILLED * self.budget
        return numpy.where(filled[:, None], together, edges)

    def _wasteful(self, edges: numpy.ndarray, widths: numpy.ndarray) -> numpy.ndarray:
        """[N]: sets whose first band below the full width would be smaller at the full width."""
        sizes = numpy.diff(edges, axis=1)
        wasteful = (sizes > 0) & (widths < self.dim) & ((sizes + self.dim) * widths >= sizes * self.dim)
        first = (sizes > 0) & (widths < self.dim)
        first &= numpy.cumsum(first, axis=1) == 1
        return (wasteful & first).any(1)

    def _parameters(self, edges: numpy.ndarray, widths: numpy.ndarray) -> numpy.ndarray:
        sizes = numpy.diff(edges, axis=1)
        projections = numpy.where((widths < self.dim) & (sizes > 0), widths, 0)
        return (sizes * widths).sum(1) + self.dim * projections.sum(1)
