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
PATIENCE = 1.0  # seconds of repetitions for one number
TOO_LONG = 10.0  # seconds for one call
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


def measure(timing: Timing, lengths: list[int], device: torch.device, seed: int) -> Iterator[str]:
    """Fills `timing` in place, length by length; yields what it does next, for a progress bar."""
    generator = torch.Generator().manual_seed(seed)
    for length in sorted(lengths):
        query, key, value = (
            torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device) for _ in range(3)
        )
        calls = {
            "SDPA": lambda q=query, k=key, v=value: _dense(q, k, v),
            "top-k": lambda q=query, k=key, v=value: sparse_attn.topk_attention(
                q, k, v, timing.top_k, is_causal=True
            ),
            "plain PyTorch": lambda q=query, k=key, v=value: plain_topk_attention(q, k, v, timing.top_k),
        }
        for name in CONTENDERS:
            yield f"{name} at T={length}"
            expected = _expected(timing, name, length)
            why_not = _why_not(name, length, expected)
            if why_not:
                timing.skipped[f"{name} at T={length}"] = why_not
            elif name == "top-k":
                _check(timing, query, key, value)
            seconds = None if why_not else _median(calls[name], device, warm_up=(expected or 0) < PATIENCE)
            timing.seconds.setdefault(length, dict.fromkeys(CONTENDERS))[name] = seconds


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _expected(timing: Timing, name: str, length: int) -> float | None:
    """From the length before, as if time went with T²."""
    known = [(t, row[name]) for t, row in timing.seconds.items() if row.get(name)]
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


def _median(call: Callable[[], Tensor], device: torch.device, warm_up: bool) -> float:
    with torch.no_grad():
        if warm_up:
            call()
        times: list[float] = []
        while not times or (sum(times) < PATIENCE and len(times) < 20):
            _synchronize(device)
            began = time.perf_counter()
            call()
            _synchronize(device)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
