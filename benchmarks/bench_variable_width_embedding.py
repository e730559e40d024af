"""`variable_width_embedding` against nn.Embedding, eager adaptive input, and torch.compile of all bands.

pytest benchmarks/bench_variable_width_embedding.py
python -m benchmarks.bench_variable_width_embedding      the ratios beside their targets, one run
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks import embedding_cases as cases
from benchmarks import timing

OP = "variable_width_embedding"


def _parameters():
    return [
        pytest.param(name, kind, backward, id=f"{name}-{kind}-{'fwd+bwd' if backward else 'fwd'}")
        for kind in cases.KINDS
        for backward in (False, True)
        for name in cases.LABELS
    ]


@pytest.mark.parametrize(("name", "kind", "backward"), _parameters())
def test_variable_width_embedding(benchmark, name, kind, backward) -> None:
    reason = cases.why_not(kind)
    if reason is not None:
        pytest.skip(reason)
    inputs = cases.make(kind)
    cases.check(name, inputs)
    call = timing.bound(*cases.prepare(name, inputs), backward)
    benchmark.group = f"{OP} {kind} ids {'fwd+bwd' if backward else 'fwd'}"
    benchmark.extra_info.update(contender=name, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)


def measure(kind: str, rounds: int) -> list[dict]:
    """One row per direction and rival: times in milliseconds, rounds of all contenders in turn."""
    inputs = cases.make(kind)
    for name in cases.LABELS:
        cases.check(name, inputs)
    rows = []
    for direction, targets in cases.TARGETS.items():
        backward = direction != "forward"
        names = [n for n in cases.LABELS if backward or not n.endswith("sparse")]
        calls = {n: timing.bound(*cases.prepare(n, inputs), backward) for n in names}
        times = timing.interleave(calls, budget=60, rounds=rounds)
        ours = times["ours"].median
        rows += [
            {
                "ids": kind,
                "direction": direction,
                "contender": name,
                "ms": 1e3 * times[name].median,
                "over_ours": times[name].median / ours,
                "target": targets.get(name),
            }
            for name in names
        ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_variable_width_embedding")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for kind in cases.KINDS:
        reason = cases.why_not(kind)
        if reason is None:
            rows += measure(kind, args.rounds)
        elif not args.json:
            print(f"left out: {kind} ids: {reason}")
    if args.json:
        print(json.dumps({"setting": cases.SETTING, "threads": args.threads, "rows": rows}, indent=1))
        return 0
    print(f"{cases.SETTING}; {args.threads} threads; torch {torch.__version__}")
    for row in rows:
        target = ""
        if row["target"] is not None:
            verdict = "met" if row["over_ours"] >= row["target"] else "falls short"
            target = f"  at least {row['target']:.2f}: {verdict}"
        head = f"{row['ids']:5} {row['direction']:19} {cases.LABELS[row['contender']]:31}"
        print(f"{head} {row['ms']:8.2f} ms  {row['over_ours']:6.2f} × ours{target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
