"""How long one attention takes: dense, top-k, and top-k written in plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sparse_attn

HEADS, HEAD_DIM = 8, 64
CONTENDERS = ("SDPA", "top-k", "plain PyTorch")
PATIENCE = 3.0  # seconds of repetitions for one length
FEWEST_ROUNDS, ROUNDS = 3, 20
TOO_LONG = 6.0  # seconds for one call
TOO_BIG = 1 << 30  # bytes of a score matrix
CHECKED_QUERIES = 128
TOLERANCE = 1e-3


class Disagreement(Exception):
    """What is to be timed does not compute the same."""


@dataclass
class Timing:
    """Seconds of one call by length and contender; None where `skipped` says why."""

    wing: str
    top_k: int
    seconds: dict[int, dict[str, float | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # "contender at T=…": why
    largest_error: float = 0.0


def plain_topk_attention(
    query: Tensor,  # [B, H, Tq, D]
    key: Tensor,  # [B, H, Tk, D]
    value: Tensor,  # [B, H, Tk, D]
    top_k: int,
    offset: int = 0,  # query i sees keys 0 … i + offset
) -> Tensor:  # [B, H, Tq, D]
    """What one would write without sparse_attn: all scores, torch.topk, gather."""
    queries, keys = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-1, -2)
    scores *= query.shape[3] ** -0.5
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(offset + 1)
    scores.masked_fill_(hidden, -torch.inf)
    best, indices = scores.topk(min(top_k, keys), dim=-1)
    gathered = value.gather(2, indices.flatten(2).unsqueeze(-1).expand(-1, -1, -1, value.shape[3]))
    return (best.softmax(-1).unsqueeze(-2) @ gathered.unflatten(2, indices.shape[2:])).squeeze(-2)


def start(top_k: int, device: torch.device) -> Timing:
    tensor = torch.empty(1, HEADS, 1, HEAD_DIM, device=device)
    return Timing(sparse_attn.explain(tensor, tensor, tensor, top_k, is_causal=True).backend, top_k)


def measure(timing: Timing, lengths: list[int], device: torch.device, seed: int) -> Iterator[int]:
    """Fills `timing` in place; yields each length that is done, for a progress bar."""
    generator = torch.Generator().manual_seed(seed)
    for length in sorted(lengths):
        row = timing.seconds[length] = dict.fromkeys(CONTENDERS)
        inputs = [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device) for _ in range(3)]
        calls = _calls(timing, length, *inputs)
        if "top-k" in calls:
            _check(timing, *inputs)
        _measure_in_turns(row, calls, device)
        yield length


def _calls(timing: Timing, length: int, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable]:
    """The contenders that can be run at this length; the others' reasons go into `timing`."""
    calls = {
        "SDPA": lambda: _dense(query, key, value),
        "top-k": lambda: sparse_attn.topk_attention(query, key, value, timing.top_k, is_causal=True),
        "plain PyTorch": lambda: plain_topk_attention(query, key, value, timing.top_k),
    }
    for name in CONTENDERS:
        why_not = _why_not(name, length, _expected(timing, name, length))
        if why_not:
            timing.skipped[f"{name} at T={length}"] = why_not
            del calls[name]
    return calls


def _measure_in_turns(row: dict[str, float | None], calls: dict[str, Callable], device: torch.device) -> None:
    """Medians over rounds, so that a disturbance of the machine hits all contenders and not one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        first = {name: _timed(call, device) for name, call in calls.items()}
        if sum(first.values()) > PATIENCE:  # what a first call costs more is little beside seconds
            row.update(first)
            return
        began = time.perf_counter()
        for done in range(ROUNDS):
            if done >= FEWEST_ROUNDS and time.perf_counter() - began > PATIENCE:
                return
            for name, call in calls.items():
                times[name].append(_timed(call, device))
                row[name] = statistics.median(times[name])


def _timed(call: Callable[[], Tensor], device: torch.device) -> float:
    _synchronize(device)
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _expected(timing: Timing, name: str, length: int) -> float | None:
    """From the length before, as if time went with T²."""
    known = [(t, row[name]) for t, row in timing.seconds.items() if row[name]]
    return known[-1][1] * (length / known[-1][0]) ** 2 if known else None


def _why_not(name: str, length: int, expected: float | None) -> str | None:
    scores = 4 * HEADS * length * length
    if name == "plain PyTorch" and scores > TOO_BIG:
        return f"its score matrix alone would take {scores / 1e9:.1f} GB"
    if expected is not None and expected > TOO_LONG:
        return f"it would take about {expected:.0f} s"
    return None


def _check(timing: Timing, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Before top-k is timed: its last queries, which see the most keys, against plain PyTorch."""
    length = query.shape[2]
    last = min(CHECKED_QUERIES, length)
    got = sparse_attn.topk_attention(query, key, value, timing.top_k, is_causal=True)[:, :, -last:]
    want = plain_topk_attention(query[:, :, -last:], key, value, timing.top_k, offset=length - last)
    error = ((got - want).abs().amax(-1) / want.abs().max()).flatten()
    # Two keys of nearly one score may change places between two roundings: a few rows may differ, not the rest.
    error = error.sort().values[: max(1, int(0.99 * error.numel()))][-1].item()
    if not error <= TOLERANCE:
        raise Disagreement(
            f"topk_attention ({timing.wing} wing) and plain PyTorch disagree at T={length}: relative error {error:.1e}"
        )
    timing.largest_error = max(timing.largest_error, error)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
