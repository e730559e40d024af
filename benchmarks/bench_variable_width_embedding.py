"""`variable_width_embedding` against nn.Embedding, eager adaptive input, and torch.compile of all bands.

pytest benchmarks/bench_variable_width_embedding.py
python -m benchmarks.widths      the ratios beside their targets, one run
"""

from __future__ import annotations

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


def measure(kind: str, rounds: int, directions: tuple[str, ...] = tuple(cases.TARGETS)) -> list[dict]:
    """One row per direction and contender: times in milliseconds, rounds of all contenders in turn."""
    inputs = cases.make(kind)
    for name in cases.LABELS:
        cases.check(name, inputs)
    rows = []
    for direction in directions:
        targets = cases.TARGETS[direction]
        backward = direction != "forward"
        names = [n for n in cases.LABELS if backward or not n.endswith("sparse")]
        calls = {n: timing.bound(*cases.prepare(n, inputs), backward) for n in names}
        times = timing.interleave(calls, budget=60, rounds=rounds)
        ours = times["ours"].median
        rows += [
            {
                "op": OP,
                "ids": kind,
                "direction": direction,
                "contender": cases.LABELS[name],
                "milliseconds": 1e3 * times[name].median,
                "over_ours": times[name].median / ours,
                "target": targets.get(name),
            }
            for name in names
        ]
    return rows
