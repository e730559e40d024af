"""The checks of the planner's arguments."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_attn.checks import describe, integer


def counts_of(counts: object) -> numpy.ndarray:
    """How often each token occurs, float64 [V]; reads the values, from whatever device they are on."""
    values: numpy.ndarray | None
    if isinstance(counts, Tensor):
        read = counts.detach().cpu()
        values = (read.float() if read.dtype == torch.bfloat16 else read).numpy()
    else:
        try:
            values = numpy.asarray(counts)
        except ValueError:
            values = None
    if values is None or values.dtype.kind not in "iuf":
        if values is not None and values.shape == (0,):
            raise ValueError("counts must have one entry per token, at least one, got none")
        raise TypeError(f"counts must be numbers, one per token, shape [V], got {describe(counts)}")
    if values.ndim != 1:
        raise ValueError(f"counts must have shape [V], one entry per token, got shape {list(values.shape)}")
    if len(values) == 0:
        raise ValueError("counts must have one entry per token, at least one, got none")
    values = values.astype(numpy.float64)
    wrong = numpy.flatnonzero(~(numpy.isfinite(values) & (values >= 0)))
    if len(wrong):
        token = int(wrong[0])
        raise ValueError(
            f"counts must be finite and not negative, got {values[token]:g} for token {token}"
            + (f" ({len(wrong)} such tokens)" if len(wrong) > 1 else "")
        )
    return values


def real(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """A number in [low, high], or in (low, high] with `above`."""
    accepted = f"a number in {'(' if above else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {accepted}, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.nan  # an int beyond the range of floats lies in no range
    if not (low < number <= high if above else low <= number <= high):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return number


def budget_of(budget: Any, ratio: Any, full: int) -> int:
    """The budget as a number of parameters, from either argument; `full` is the size of the full table."""
    if (budget is None) == (ratio is None):
        came = "neither" if budget is None else f"budget={budget!r} and ratio={ratio!r}"
        raise ValueError(
            f"exactly one of budget (a number of parameters) and ratio (a share of the full table) must be given, "
            f"got {came}"
        )
    if ratio is not None:
        if isinstance(ratio, Real) and not isinstance(ratio, bool) and 1 < float(ratio) < math.inf:
            raise ValueError(
                f"ratio is the plan's share of the full table's parameters and must be in (0, 1], got {ratio}; "
                f"for a plan {ratio:g} times smaller give ratio=1/{ratio:g}"
            )
        return int(real("ratio", ratio, 0, 1, above=True) * full)
    if isinstance(budget, float) and budget.is_integer():
        budget = int(budget)  # 1e6
    return int(integer("budget", budget, 1))
