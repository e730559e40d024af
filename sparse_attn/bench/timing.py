"""Interleaved timing: A B C A B C …, then medians, so that a change of the machine's speed hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward", "both")
SHORTEST_SAMPLE = 0.003  # seconds; quicker calls are repeated within one sample


@dataclass
class Times:
    """Seconds per call, one entry per round."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    budget: float,
    rounds: int = 15,
    least: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times of each call over `least` to `rounds` rounds, fewer where `budget` seconds are over."""
    repeats, cost = {}, 0.0
    for name, call in calls.items():
        once = _timed(call, 1, clock)  # the warm-up: allocations, code pages, thread pools
        if once < 0.2:
            once = _timed(call, 1, clock)
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / once))
        cost += once * repeats[name]
    count = max(least, min(rounds, int(budget / cost)))
    times = {name: Times() for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            times[name].samples.append(_timed(call, repeats[name], clock) / repeats[name])
    return times


def _timed(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return clock() - start


def bound(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...], direction: str) -> Callable[[], object]:
    """The call to time: the forward without gradients, the backward of one forward, or both.

    Gradients are those of every leaf of a floating-point dtype.
    """
    if direction == "forward":

        def inference() -> Tensor:
            with torch.no_grad():
                return forward(*leaves)

        return inference
    leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in leaves)
    wanted = tuple(t for t in leaves if t.requires_grad)
    out = forward(*leaves)
    grad_out = torch.randn_like(out.detach())
    if direction == "backward":
        return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)
    return _both(forward, leaves, wanted, grad_out)


def _both(forward, leaves, wanted, grad_out) -> Callable[[], object]:
    """Apart from `bound`, so that nothing of its one forward is kept."""
    return lambda: torch.autograd.grad(forward(*leaves), wanted, grad_out)


def call_overhead(call: Callable[[], object], calls: int = 3000) -> Times:
    """Every call timed by itself, after a warm-up: what one call costs with hardly anything to compute."""
    for _ in range(200):
        call()
    samples = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) * 1e-9)
    return Times(samples)
