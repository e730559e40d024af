"""Means with 95 % intervals by Student's t, without any package for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean of independent values and half the width of its 95 % interval; None for one value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def interval(values: Sequence[float]) -> Interval:
    """The mean of values that are independent of each other, such as differences of documents.

    Raises:
        ValueError: there are none.

    Example:
        >>> from sparse_attn.evaluation.intervals import interval
        >>> print(interval([1.0, 2.0, 3.0]))
        +2.0000 ± 2.4841
    """
    count = len(values)
    if not count:
        raise ValueError("an interval needs at least one value, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Interval(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def t_quantile(freedom: int) -> float:
    """The number that Student's t exceeds with a probability of 2.5 %."""
    low, high = 1.9, 13.0  # those of endless freedom and of one degree lie between
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(bound: float, freedom: int) -> float:
    """P(|t| < bound), by Simpson's rule in the angle whose tangent is t / √freedom: a power of its cosine."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    end, steps = math.atan(bound / math.sqrt(freedom)), 400
    weights = [1, *[4, 2] * (steps // 2 - 1), 4, 1]
    terms = (w * math.cos(end * i / steps) ** (freedom - 1) for i, w in enumerate(weights))
    return 2 * math.exp(log_scale) * math.fsum(terms) * end / steps / 3
