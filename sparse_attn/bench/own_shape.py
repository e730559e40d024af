"""What would be faster at a shape of one's own: `topk_attention` at each top_k beside what one would call instead.

Forward, forward + backward, and one decoding step at that cache length. What each call will take is estimated first, on
a few queries; what would take too long, or too much memory, is left out and said so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_attn.bench import machine, registry, runner, timing
from sparse_attn.bench.attention import AttentionCase
from sparse_attn.bench.runner import Step

RIVALS = ("sdpa", "flex", "plain_tuned")
PROBED = 64  # queries that an estimate runs on
CALLS = 7  # of each contender: warm-up, check, a few rounds
COMPILING = 15.0  # seconds, of FlexAttention
OP = "topk_attention"


@dataclass(frozen=True)
class Shape:
    """query [batch, heads, queries, dim], key and value [batch, kv_heads, keys, dim]."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.kv_heads} Tq={self.queries} Tk={self.keys} D{self.dim}"


@dataclass(frozen=True)
class Wish:
    """What was asked for; `seconds`: what all of it may take."""

    shape: Shape
    top_k: tuple[int, ...]
    dtypes: tuple[str, ...]
    causal: bool = True
    seconds: float = 120.0


def groups(wish: Wish) -> Iterator[list[AttentionCase]]:
    """Cases that share their tensors, one per top_k: each dtype forward, in training, and decoding."""
    s = wish.shape
    for dtype in wish.dtypes:
        base = AttentionCase(
            OP,
            s.keys,
            dtype,
            batch=s.batch,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.dim,
            query_length=None if s.queries == s.keys else s.queries,
            causal=wish.causal,
        )
        kinds = [replace(base, query_length=1)]  # the whole cache is visible
        if s.queries != 1:
            kinds = [base, replace(base, direction="both"), *kinds]
        for kind in kinds:
            yield [replace(kind, top_k=k) for k in wish.top_k]


def steps(wish: Wish) -> int:
    """How often `run` tells what comes next."""
    return 2 * sum(1 for _ in groups(wish))


def run(wish: Wish, threads: int, command: str, step: Step) -> dict:
    """Estimates, then measures; one JSON-able dict with a row per case and a verdict."""
    op, all_groups = registry.op(OP), list(groups(wish))
    estimates, start = [], time.perf_counter()
    for cases in all_groups:
        step(f"estimating {_kind(cases[0])}")
        estimates.append(_estimates(cases))
    rows, left_out = [], []
    for at, (cases, seconds) in enumerate(zip(all_groups, estimates, strict=True)):
        step(f"measuring {_kind(cases[0])}")
        remaining = wish.seconds - (time.perf_counter() - start)
        share = max(0.0, remaining) / (len(all_groups) - at)  # what one does not use is left to the next
        kept, absent = _chosen(cases, seconds, share)
        if kept:
            rows += runner.measure(
                op,
                kept,
                op.inputs(kept[0]),
                RIVALS,
                budget=min(6.0, share / 3),
                rounds=15,
                forgiving=True,
                absent={n: why for n, why in absent.items() if n in RIVALS},
            )
            for row in rows[-len(kept) :]:  # the shape stands in the title
                row["name"] = f"{_kind(cases[0])}, K={row['case']['top_k']}"
        kind = _kind(cases[0])
        failed = rows[-1]["left_out"] if kept else {}
        reasons = {op.labels.get(n, n): why for n, why in {**absent, **failed}.items()}
        left_out += [f"{kind}, {label}: {why}" for label, why in reasons.items()]
    return {
        "format": 1,
        "setting": f"{wish.shape}, {'causal' if wish.causal else 'not causal'}, on the CPU",
        "machine": machine.describe(threads, command),
        "headline": rows,
        "left_out": left_out,
        "verdict": verdict(rows),
    }


def _kind(case: AttentionCase) -> str:
    return f"{case.dtype} {_direction(vars(case))}"


def _direction(case: dict) -> str:
    if case["query_length"] == 1:
        return "one decoding step"
    return runner.DIRECTIONS[case["direction"]]


def _probe(case: AttentionCase) -> tuple[AttentionCase, float]:
    """A case of few queries that see as many keys as those of `case` do on average; how much more `case` is."""
    hidden = (case.queries - 1) / 2 if case.causal else 0
    few = min(PROBED, case.queries)
    visible = max(1, round(case.length - hidden))
    small = replace(case, batch=1, length=visible, query_length=few, causal=False)
    return small, case.batch * case.queries / few


def _estimates(cases: list[AttentionCase]) -> dict[str, float]:
    """Seconds of one call: of SDPA, of plain PyTorch and of ours (at the largest top_k, "ours")."""
    op = registry.op(OP)
    small, times = _probe(max(cases, key=lambda c: c.top_k))
    inputs, seconds = op.inputs(small), {}
    for name in ("ours", "sdpa", "plain_tuned"):
        work = op.prepare(name, small, inputs)
        call = timing.bound(work.forward, work.leaves, small.direction)
        call()
        start = time.perf_counter()
        call()
        seconds[name] = times * (time.perf_counter() - start)
    seconds["flex"] = 2 * seconds["sdpa"]
    return seconds


def _chosen(
    cases: list[AttentionCase], seconds: dict[str, float], share: float
) -> tuple[list[AttentionCase], dict[str, str]]:
    """(the cases that the time is enough for, contender or "K=…" → why it is left out)."""
    absent: dict[str, str] = {}
    kept: list[AttentionCase] = []
    left = share

    def fits(name: str, calls: float, extra: float = 0.0) -> bool:
        nonlocal left
        cost = calls * seconds[name] + extra
        if cost > left:
            absent[name] = (
                f"about {seconds[name]:,.1f} s a call, {cost:,.0f} s in all: more than what is left of --seconds"
            )
            return False
        left -= cost
        return True

    for case in cases:
        if fits("ours", CALLS):
            kept.append(case)
        else:
            absent[f"K={case.top_k}"] = absent.pop("ours")
        if len(kept) == 1 and case is kept[0]:
            fits("sdpa", CALLS)  # before more of ours: what they are compared with
    if not kept:
        return [], absent
    direction = kept[0].direction
    matrix = kept[0].scores * (4 if kept[0].dtype == "float32" else 2) * (4 if direction == "both" else 2)
    gathered = kept[-1].scores // kept[0].length * kept[-1].top_k * kept[0].head_dim * 8
    need, have = matrix + gathered, machine.available_bytes()
    if have and need > have / 2:
        absent["plain_tuned"] = f"its stored scores and gathered rows take some {need / 1e9:,.1f} GB"
    else:
        fits("plain_tuned", CALLS * len(kept))
    if direction == "forward":
        fits("flex", CALLS, COMPILING)
    return kept, absent


def verdict(rows: list[dict]) -> list[str]:
    """One plain sentence per dtype: which is faster where, and by how much; dense attention is named where it wins."""
    sentences = []
    for dtype in dict.fromkeys(row["case"]["dtype"] for row in rows):
        parts = []
        own = [row for row in rows if row["case"]["dtype"] == dtype and "sdpa" in row["rivals"]]
        for kind in dict.fromkeys(_direction(row["case"]) for row in own):
            ratios = [
                (f"K={row['case']['top_k']}", row["rivals"]["sdpa"]["faster"])
                for row in own
                if _direction(row["case"]) == kind
            ]
            parts.append(f"{kind}: {_who_wins(ratios)}")
        if parts:
            lost = all(row["rivals"]["sdpa"]["faster"] < 1.05 for row in own)
            end = "; it pays nowhere here, so stay with SDPA." if lost else "."
            sentences.append(f"At this shape in {dtype}, {'; '.join(parts)}{end}")
    return sentences or ["SDPA was not measured beside it, so nothing can be said about which is faster."]


def _who_wins(ratios: list[tuple[str, float]]) -> str:
    """The top_k's by whether ours is faster, as fast (within 5 %), or slower than SDPA."""
    wins = [f"{f:.1f}× at {k}" for k, f in ratios if f >= 1.05]
    ties = [k for k, f in ratios if 0.95 < f < 1.05]
    losses = [f"{1 / f:.1f}× at {k}" for k, f in ratios if f <= 0.95]
    parts = [f"topk_attention is faster than SDPA ({', '.join(wins)})"] if wins else []
    parts += [f"both are as fast ({', '.join(ties)})"] if ties else []
    parts += [f"SDPA is faster ({', '.join(losses)})"] if losses else []
    return ", ".join(parts)
