"""Faults that were found by using the package, each as a small program that shows what holds now.

    cd tests && python -m faults              every case: what was wrong, what the program gives now
    cd tests && python -m faults --write      the same, as the table in docs/faults.md

A case is a function that returns, in a few words, what it sees now, and raises AssertionError where that is wrong. It
judges by an oracle of its own: plain torch, a float64 formula, or the same model with dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

FILES = ("derivatives", "state", "huggingface", "copies", "graphs", "processes")


@dataclass(frozen=True)
class Case:
    what: str  # was done
    was: str  # what it gave
    run: Callable[[], str]  # what it gives now

    @property
    def name(self) -> str:
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"


CASES: list[Case] = []


def case(what: str, was: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(run: Callable[[], str]) -> Callable[[], str]:
        CASES.append(Case(what, was, run))
        return run

    return add


def refused(call: Callable[[], object], *words: str) -> str:
    """The sentence with which `call` is refused, which must hold these words."""
    try:
        result = call()
    except (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        for word in words:
            assert word in text, f"the refusal does not speak of {word!r}: {text}"
        return f"refused: {type(error).__name__}, “{text[:150]}{'…' if len(text) > 150 else ''}”"
    raise AssertionError(f"not refused, gave {result!r}")


def off_by(ours, right, most: float) -> str:
    """The largest difference, which must not pass `most`."""
    difference = (ours.double() - right.double()).abs().max().item()
    assert difference <= most, f"off by {difference:.3g}, at most {most:g} is right"
    return f"off by {difference:.0e}" if difference else "equal"


def all_cases() -> list[Case]:
    if not CASES:
        for file in FILES:
            import_module(f"{__name__}.{file}")
    return CASES
