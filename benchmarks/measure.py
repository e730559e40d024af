"""Runs the comparisons of `cases.py` and turns them into rows of plain numbers, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks import cases, contenders, inputs, memory, timing
from benchmarks.cases import Case, Comparison
from benchmarks.correctness import check


@dataclass(frozen=True)
class Settings:
    """How thoroughly: seconds per comparison, the longest sequence, the threads."""

    threads: int
    budget: float  # seconds of timing per comparison
    least: int  # rounds, however long they take
    max_length: int
    scaling_budget: float
    scaling_max: int

    @classmethod
    def of(cls, quick: bool, threads: int, max_length: int | None) -> Settings:
        longest = max_length or 10**9
        if quick:
            return cls(threads, 1.2, 3, longest, 0.5, min(longest, 8192))
        return cls(threads, 4.0, 5, longest, 4.0, longest)


def problem(comparison: Comparison, settings: Settings) -> str | None:
    """Why this comparison is left out, or None."""
    case = comparison.case
    if case.length > settings.max_length:
        return f"sequences past T={settings.max_length}, by --max-length"
    return inputs.why_not(
        case.inputs, case.length, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim
    )


def tensors_of(case: Case):
    return inputs.make(
        case.inputs,
        case.length,
        heads=case.heads,
        kv_heads=case.kv_heads,
        query_length=case.query_length,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )


def compare(comparison: Comparison, settings: Settings) -> dict:
    """One row: medians of ours and of each rival that can run, and how many times faster ours is."""
    case = comparison.case
    tensors = tensors_of(case)
    left_out = {n: contenders.why_not(n, case) for n in comparison.rivals}
    names = ["ours", *(n for n in comparison.rivals if left_out[n] is None)]
    calls = {}
    for name in names:
        forward = contenders.prepare(name, case, tensors)
        check(name, case, forward, tensors)
        calls[name] = timing.bound(forward, tensors, case.backward)
    times = timing.interleave(calls, budget=settings.budget, rounds=comparison.rounds, least=settings.least)
    ours = times["ours"].median
    rivals = {}
    for name in names[1:]:
        faster, target = times[name].median / ours, comparison.targets.get(name)
        rivals[name] = {
            "milliseconds": times[name].median * 1e3,
            "quartiles": [1e3 * t for t in times[name].quartiles()],
            "faster": faster,
            "target": target,
            "met": None if target is None else faster >= target,
        }
    return {
        "name": str(case),
        "case": asdict(case),
        "note": comparison.note,
        "rounds": len(times["ours"].samples),
        "milliseconds": ours * 1e3,
        "quartiles": [1e3 * t for t in times["ours"].quartiles()],
        "rivals": rivals,
        "left_out": {n: reason for n, reason in left_out.items() if reason is not None},
    }


def comparisons(
    which: Iterable[Comparison], settings: Settings, step: Callable[[str], None]
) -> tuple[list[dict], list[str]]:
    """(rows, reasons for what was left out); `step` is told of each before it starts."""
    rows, skipped = [], []
    for comparison in which:
        reason = problem(comparison, settings)
        step(str(comparison.case))
        if reason is not None:
            skipped.append(reason)
            continue
        rows.append(compare(comparison, settings))
    return rows, skipped


def scaling(settings: Settings, step: Callable[[str], None]) -> dict[str, dict]:
    """Per op the seconds at each length and the exponent of the straight line through them in log-log."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in cases.SCALING}
    for length in sorted({n for lengths in cases.SCALING.values() for n in lengths}):
        names = [n for n, lengths in cases.SCALING.items() if length in lengths]
        step(f"scaling T={length}")
        if length > settings.scaling_max:
            continue
        case = Case("topk_attention", length)
        tensors = tensors_of(case)
        calls = {}
        for name in names:
            who = "sdpa" if name == "sdpa" else "ours"
            forward = contenders.prepare(who, case if who == "sdpa" else replace(case, op=name), tensors)
            calls[name] = timing.bound(forward, tensors, backward=False)
        times = timing.interleave(calls, budget=settings.scaling_budget, rounds=11)
        for name in names:
            seconds[name][length] = times[name].median
    return {
        name: {
            "lengths": list(points),
            "milliseconds": [1e3 * s for s in points.values()],
            "exponent": exponent(list(points), list(points.values())),
        }
        for name, points in seconds.items()
    }


def exponent(lengths: list[int], seconds: list[float]) -> float | None:
    """p of seconds ≈ c·T^p by least squares on logarithms."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def peak_memory(settings: Settings, quick: bool, step: Callable[[str], None]) -> list[dict]:
    """Peak memory beyond the inputs, each in its own process; the first row has the target."""
    length = min(cases.MEMORY_LENGTH, settings.max_length)
    runs = [("topk_attention", False, length)]
    if not quick:
        runs += [
            ("topk_attention", True, length),
            ("gathered_attention", False, length),
            ("sdpa", False, length),
        ]
    rows = []
    for op, backward, at in runs:
        step(f"peak memory of {op} T={at}")
        row = memory.measure(op, at, dtype="float32", backward=backward, threads=settings.threads)
        target = cases.MEMORY_TARGET_MB if (op, backward, at) == (*runs[0][:2], cases.MEMORY_LENGTH) else None
        row |= {"target_mb": target, "met": None if target is None else row["extra_mb"] < target}
        rows.append(row)
    return rows


def overhead(quick: bool, step: Callable[[str], None]) -> dict:
    """Microseconds of one small call without gradients: ours and SDPA, blocks of each in turn."""
    case = Case("topk_attention", cases.OVERHEAD_LENGTH)
    step("overhead of one call")
    tensors = tensors_of(case)
    samples: dict[str, list[float]] = {"ours": [], "sdpa": []}
    for _ in range(2 if quick else 5):
        for name, total in samples.items():
            forward = contenders.prepare(name, case, tensors)
            total += timing.call_overhead(lambda f=forward: f(*tensors), 1000).samples
    ours, sdpa = (timing.Times(samples[name]).median * 1e6 for name in ("ours", "sdpa"))
    return {
        "length": case.length,
        "microseconds": ours,
        "sdpa_microseconds": sdpa,
        "target_us": cases.OVERHEAD_TARGET_US,
        "met": ours < cases.OVERHEAD_TARGET_US,
    }
