"""The cases of all ops, found by their files: `cases/<op>.py` ends in `OP = …`, an `Op` of that name.

A new op needs that one file and nothing else: from it come `sparse-attn bench --op NAME`, the standard table of its
suite, and the pytest-benchmark suite of `pytest benchmarks`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from sparse_attn.bench import cases

Inputs = Any  # what an op's `inputs` returns and its `prepare` and `check` take
SUITES = ("attention", "selection", "widths")  # one table, JSON and picture each


class WrongResult(AssertionError):
    """A contender computed something else; its time would mean nothing."""


class Case(Protocol):
    """One call on one set of inputs: a frozen dataclass, whose `str` is short and says all that matters."""

    op: str
    direction: str  # forward, backward, both


@dataclass(frozen=True)
class Work:
    """What is timed: `forward(*leaves)`, and the gradients of the leaves."""

    forward: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Comparison:
    """Ours against rivals on one case. `faster` is a rival's time over ours: 1 is equally fast, 0.5 half as fast."""

    case: Case
    rivals: tuple[str, ...]
    targets: dict[str, float] = field(default_factory=dict)  # rival → the least acceptable `faster`
    section: str = "headline"  # headline, real, know_before_use
    note: str = ""  # why a user should care
    rounds: int = 15  # most interleaved rounds
    least: int | None = None  # rounds, however long they take (None: as the run says)
    seconds: float | None = None  # of timing (None: as the run says)
    environment: tuple[tuple[str, str], ...] = ()  # measured in a process of its own with these variables


@dataclass(frozen=True)
class Peak:
    """A measurement of peak memory: of `contender` on `case`, at most `target_mb` where there is a target."""

    case: Case
    contender: str = "ours"
    target_mb: float | None = None
    target: float | None = None  # or: at least so many times as much as ours


class Op:
    """What an op's case file says. Contenders have short names, "ours" first; `labels` are for the eye."""

    name: str
    suite: str  # which standard table
    setting: str  # what holds unless a row says otherwise
    labels: dict[str, str]
    # Contenders that compute the same whatever top_k is: timed once for all of them.
    dense: tuple[str, ...] = ()

    def comparisons(self, quick: bool) -> list[Comparison]:
        """The rows of the standard table; quick: those of a smoke test."""
        raise NotImplementedError

    def cases(self) -> list[Case]:
        """What the pytest-benchmark suite times, each with every contender."""
        raise NotImplementedError

    def inputs_problem(self, case: Case) -> str | None:
        """None if there are such inputs here, else the reason in one clause."""
        return None

    def problem(self, contender: str, case: Case) -> str | None:
        """None if the contender can run the case here, else the reason in one clause."""
        return None

    def inputs(self, case: Case) -> Inputs:
        """The same tensors for all contenders; the same in every run."""
        raise NotImplementedError

    def prepare(self, contender: str, case: Case, inputs: Inputs) -> Work:
        """Masks, indices and compiled graphs are made here, before the clock runs."""
        raise NotImplementedError

    def check(self, contender: str, case: Case, inputs: Inputs, work: Work) -> None:
        """Raises WrongResult unless the result, and the gradients if timed, are what they should be."""
        raise NotImplementedError

    def remark(self, case: Case) -> str:
        """What the checks of a case found out that a reader wants to know; stands with the row's note."""
        return ""

    def scaling(self) -> dict[str, list[Case]]:
        """Contender → cases over which its time is followed (none: no curve)."""
        return {}

    def peaks(self, quick: bool) -> list[Peak]:
        """Peak memory is measured of these."""
        return []

    def peak_facts(self, case: Case) -> dict:
        """What stands beside a peak in the report."""
        return {}

    def warm_up(self, contender: str, case: Case) -> Work:
        """The same on little: it loads code and thread pools before memory is measured."""
        raise NotImplementedError

    def overhead(self) -> tuple[Case, float] | None:
        """A case with hardly anything to compute, and the most microseconds that one call may take."""
        return None


def names() -> tuple[str, ...]:
    """The ops that have a case file, by the alphabet; imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(cases.__path__)))


@cache
def op(name: str) -> Op:
    """The op of `cases/<name>.py`."""
    found = import_module(f"{cases.__name__}.{name}").OP
    if found.name != name or found.suite not in SUITES or next(iter(found.labels)) != "ours":
        raise ValueError(
            f"cases/{name}.py: OP must be named {name}, be in one of {SUITES} and list ours first"
        )
    return found


def suite(name: str) -> list[Op]:
    """All ops of a suite."""
    return [found for found in map(op, names()) if found.suite == name]
