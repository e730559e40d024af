"""Runs cases: each contender is checked, then all are timed in turn; rows of plain numbers, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from sparse_attn.bench import memory, registry, timing
from sparse_attn.bench.process import alone
from sparse_attn.bench.registry import Case, Comparison, Inputs, Op
from sparse_attn.bench.timing import Times

Step = Callable[[str], None]  # told what comes next


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


def problem(case: Case, longest: int) -> str | None:
    """Why this case is left out, or None."""
    if getattr(case, "length", 0) > longest:
        return f"sequences past T={longest}, by --max-length"
    return registry.op(case.op).inputs_problem(case)


def compare(comparison: Comparison, settings: Settings) -> dict:
    """One row: medians of ours and of each rival that can run, and how many times as fast ours is."""
    if comparison.environment:
        inside = replace(comparison, environment=())
        return alone(_compare_there, inside, settings, environment=dict(comparison.environment))
    op = registry.op(comparison.case.op)
    return measure(
        op,
        [comparison.case],
        op.inputs(comparison.case),
        comparison.rivals,
        targets=comparison.targets,
        note=comparison.note,
        rounds=comparison.rounds,
        least=settings.least if comparison.least is None else comparison.least,
        budget=settings.budget if comparison.seconds is None else comparison.seconds,
    )[0]


def _compare_there(comparison: Comparison, settings: Settings) -> dict:
    torch.set_num_threads(settings.threads)
    return compare(comparison, settings)


def measure(
    op: Op,
    cases: list[Case],
    inputs: Inputs,
    rivals: tuple[str, ...],
    *,
    budget: float,
    rounds: int = 15,
    least: int = 3,
    targets: dict[str, float] | None = None,
    note: str = "",
    forgiving: bool = False,
    absent: dict[str, str] | None = None,
) -> list[dict]:
    """A row per case, all contenders of all cases in turn; the cases differ in top_k alone.

    A contender that computes the same for any top_k is timed once and stands in every row.

    Args:
        forgiving: a rival that fails to run is left out with its reason instead of ending the run.
        absent: rivals that the caller leaves out, with the reason.
    """
    calls: dict[tuple[str, int], Callable] = {}
    left_out: list[dict[str, str]] = []
    for at, case in enumerate(cases):
        reasons = {n: (absent or {}).get(n) or op.problem(n, case) for n in rivals}
        for name in ("ours", *rivals):
            key = (name, 0 if name in op.dense else at)
            if reasons.get(name) is not None or key in calls:
                continue
            try:
                calls[key] = _checked(op, name, case, inputs)
            except Exception as error:
                if not forgiving or name == "ours" or isinstance(error, registry.WrongResult):
                    raise
                reasons[name] = (
                    f"it failed ({type(error).__name__}: {str(error).strip().splitlines()[0][:160]})"
                )
        left_out.append({n: reason for n, reason in reasons.items() if reason is not None})
    times = timing.interleave(calls, budget=budget, rounds=rounds, least=least)
    return [
        _row(op, case, at, rivals, times, targets or {}, note) | {"left_out": left_out[at]}
        for at, case in enumerate(cases)
    ]


def _checked(op: Op, name: str, case: Case, inputs: Inputs) -> Callable[[], object]:
    work = op.prepare(name, case, inputs)
    op.check(name, case, inputs, work)
    return timing.bound(work.forward, work.leaves, case.direction)


def _row(op: Op, case: Case, at: int, rivals, times: dict[tuple[str, int], Times], targets, note) -> dict:
    ours = times["ours", at]
    row = {
        "op": op.name,
        "name": str(case),
        "case": {**asdict(case), "backward": case.direction != "forward"},
        "note": "; ".join(filter(None, (note, op.remark(case)))),
        "rounds": len(ours.samples),
        "milliseconds": ours.median * 1e3,
        "quartiles": [1e3 * t for t in ours.quartiles()],
        "rivals": {},
    }
    for name in rivals:
        own = times.get((name, 0 if name in op.dense else at))
        if own is None:
            continue
        faster, target = own.median / ours.median, targets.get(name)
        row["rivals"][name] = {
            "milliseconds": own.median * 1e3,
            "quartiles": [1e3 * t for t in own.quartiles()],
            "faster": faster,
            "target": target,
            "met": None if target is None else faster >= target,
        }
    return row


def comparisons(which: list[Comparison], settings: Settings, step: Step) -> tuple[list[dict], list[str]]:
    """(rows, reasons for what was left out)."""
    rows, skipped = [], []
    for comparison in which:
        reason = problem(comparison.case, settings.max_length)
        step(str(comparison.case))
        if reason is None:
            rows.append({**compare(comparison, settings), "section": comparison.section})
        else:
            skipped.append(reason)
    return rows, skipped


def scaling(ops: list[Op], settings: Settings, step: Step) -> dict[str, dict]:
    """Per op or rival the time at each length and the exponent of the straight line through them in log-log."""
    curves = {
        (op.name if who == "ours" else who): (op, who, {case.length: case for case in cases})
        for op in ops
        for who, cases in op.scaling().items()
    }
    seconds: dict[str, dict[int, float]] = {name: {} for name in curves}
    for length in sorted({n for _, _, cases in curves.values() for n in cases}):
        step(f"scaling T={length}")
        if length > settings.scaling_max:
            continue
        here = {name: (op, who, at[length]) for name, (op, who, at) in curves.items() if length in at}
        op, _, case = next(iter(here.values()))
        inputs = op.inputs(case)  # they share the shape
        calls = {}
        for name, (op, who, case) in here.items():
            work = op.prepare(who, case, inputs)
            calls[name] = timing.bound(work.forward, work.leaves, case.direction)
        times = timing.interleave(calls, budget=settings.scaling_budget, rounds=11)
        for name in here:
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


DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def peak_memory(ops: list[Op], settings: Settings, quick: bool, step: Step) -> list[dict]:
    """Peak memory beyond the inputs, each in its own process."""
    rows = []
    for op in ops:
        peaks = [p for p in op.peaks(quick) if op.problem(p.contender, p.case) is None]
        ours = None
        for peak in peaks:
            case = peak.case
            shorter = getattr(case, "length", 0) > settings.max_length
            if shorter:  # the target is that of the whole length
                case = replace(case, length=settings.max_length)
            step(f"peak memory of {op.labels[peak.contender]}, {case}")
            row = {
                "op": op.name if peak.contender == "ours" else peak.contender,
                "contender": op.labels[peak.contender],
                "dtype": getattr(case, "dtype", "float32"),
                "direction": DIRECTIONS[case.direction],
                **op.peak_facts(case),
                **memory.measure(replace(peak, case=case), settings.threads),
            }
            ours = row["extra_mb"] if peak.contender == "ours" else ours
            target_mb = None if shorter else peak.target_mb
            row |= {"target_mb": target_mb, "met": None if target_mb is None else row["extra_mb"] < target_mb}
            if ours:
                row |= {"over_ours": row["extra_mb"] / ours, "target": peak.target}
            rows.append(row)
    return rows


def overhead(ops: list[Op], quick: bool, step: Step) -> dict | None:
    """Microseconds of one small call without gradients: ours and SDPA, blocks of each in turn."""
    found = next(((op, *op.overhead()) for op in ops if op.overhead()), None)
    if found is None:
        return None
    op, case, target = found
    step("overhead of one call")
    inputs = op.inputs(case)
    samples: dict[str, list[float]] = {"ours": [], "sdpa": []}
    for _ in range(2 if quick else 5):
        for name, total in samples.items():
            work = op.prepare(name, case, inputs)
            total += timing.call_overhead(lambda w=work: w.forward(*w.leaves), 1000).samples
    ours, sdpa = (Times(samples[name]).median * 1e6 for name in ("ours", "sdpa"))
    return {
        "length": case.length,
        "microseconds": ours,
        "sdpa_microseconds": sdpa,
        "target_us": target,
        "met": ours < target,
    }
