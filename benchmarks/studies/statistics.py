"""Means with confidence intervals, by scipy.stats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval by Student's t, and the p-value of a mean of zero; None for one value."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4f} (one run)"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, such as one per seed, or of their differences where seeds are paired."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None, None, len(values))
    found = stats.ttest_1samp(values, 0.0)
    bounds = found.confidence_interval(0.95)
    return Interval(mean, float(bounds.low), float(bounds.high), float(found.pvalue), len(values))
