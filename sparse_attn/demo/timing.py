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
SECONDS = 10.0  # for all lengths together
ROUNDS = 20  # the most repetitions at one length
CALLS = 2  # of a contender at a length, the fewest: a first call, and one that is timed
PROBE = 256  # length of the calls from which the first estimates are made
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


def measure(
    timing: Timing, lengths: list[int], device: torch.device, seed: int, seconds: float = SECONDS
) -> Iterator[int]:
    """Fills `timing` in place; yields each length that is done, for a progress bar.

    All lengths together take about `seconds` at most: what an estimate says would not fit is left out, plain PyTorch
    first, and `timing.skipped` says so.
    """
    ends = time.perf_counter() + seconds
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(lengths)
    pace = _probe(timing, min(PROBE, *lengths), device, generator) if lengths else {}
    for number, length in enumerate(lengths):
        row = timing.seconds[length] = dict.fromkeys(CONTENDERS)
        longer = lengths[number + 1 :]
        left = ends - time.perf_counter()
        # Time is kept back for dense and top-k attention at the longer lengths, as far as some is left for this one.
        spared = CALLS * sum(_expected(pace, name, t) for name in ("SDPA", "top-k") for t in longer)
        share = max(left - spared, left / (1 + len(longer)))
        chosen = _chosen(timing, pace, length, share)
        if chosen:
            inputs = _inputs(length, device, generator)
            calls = {name: call for name, call in _contenders(timing, *inputs).items() if name in chosen}
            if "top-k" in calls:
                _check(timing, *inputs)
            _measure_in_turns(row, calls, device, time.perf_counter() + share / (1 + len(longer)))
            pace |= {name: (length, row[name]) for name in calls}
        yield length


def _inputs(length: int, device: torch.device, generator: torch.Generator) -> list[Tensor]:
    """query, key, value [1, HEADS, length, HEAD_DIM]"""
    return [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device) for _ in range(3)]


def _contenders(timing: Timing, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "SDPA": lambda: _dense(query, key, value),
        "top-k": lambda: sparse_attn.topk_attention(query, key, value, timing.top_k, is_causal=True),
        "plain PyTorch": lambda: plain_topk_attention(query, key, value, timing.top_k),
    }


def _probe(
    timing: Timing, length: int, device: torch.device, generator: torch.Generator
) -> dict[str, tuple[int, float]]:
    """For each contender (length, seconds of a call) at a length so short that all can be tried."""
    calls = _contenders(timing, *_inputs(length, device, generator))
    with torch.no_grad():
        return {
            name: (length, min(_timed(call, device) for _ in range(CALLS))) for name, call in calls.items()
        }


def _expected(pace: dict[str, tuple[int, float]], name: str, length: int) -> float:
    """Seconds of a call, from the longest one measured, as if time went with T²."""
    known, seconds = pace[name]
    return seconds * (length / known) ** 2


def _chosen(timing: Timing, pace: dict[str, tuple[int, float]], length: int, seconds: float) -> list[str]:
    """The contenders for which `seconds` are enough; the others' reasons go into `timing`."""
    chosen = []
    scores = 4 * HEADS * length * length
    for name in ("top-k", "SDPA", "plain PyTorch"):
        expected = _expected(pace, name, length)
        why_not = None
        if name == "plain PyTorch" and scores > TOO_BIG:
            why_not = f"its score matrix alone would take {scores / 1e9:.1f} GB"
        elif CALLS * expected > seconds:
            why_not = f"a call would take about {expected:.1f} s, and {max(seconds, 0):.1f} s were left"
        if why_not:
            timing.skipped[f"{name} at T={length}"] = why_not
        else:
            chosen.append(name)
            seconds -= CALLS * expected
    return chosen


def _measure_in_turns(
    row: dict[str, float | None], calls: dict[str, Callable], device: torch.device, ends: float
) -> None:
    """Medians over rounds, so that a disturbance of the machine hits all contenders and not one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for name, call in calls.items():
            if name != "top-k":  # whose first call was the check's
                call()
        for done in range(ROUNDS):
            if done and time.perf_counter() > ends:
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
