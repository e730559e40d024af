"""Fewer cases than the full product where one case is slow: every pair of values of two parameters, once at least."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def rows(**values: Iterable) -> list[tuple]:
    """Tuples, one value per name, in which any two values of different names stand together somewhere.

    Greedy: the next row is the one of the whole product that has most pairs not seen yet, the first one of several.
    A fault that takes one value, or two that meet, is so found with certainty; what three alone would show is left
    to the wings that run natively, whose tests take the full product.
    """
    product = list(itertools.product(*(list(v) for v in values.values())))
    numbers = list(itertools.product(*(range(len(list(v))) for v in values.values())))

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*(pairs(n) for n in numbers))
    chosen = []
    while missing:
        best = max(numbers, key=lambda n: len(pairs(n) & missing))
        chosen.append(product[numbers.index(best)])
        missing -= pairs(best)
    return chosen


def pairwise(**values: Iterable) -> pytest.MarkDecorator:
    """`parametrize` with such rows.

    Example:
        >>> @pairwise(dtype=DTYPES, shared=[1, 8], layout=LAYOUTS)
        ... def test_strides(wing, dtype, shared, layout): ...
    """
    return pytest.mark.parametrize(tuple(values), rows(**values))
