"""`variable_width_cross_entropy` against the dense head, fused and not, and the approximate adaptive softmax.

pytest benchmarks/bench_variable_width_cross_entropy.py
python -m benchmarks.widths      the ratios beside their targets, one run
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import cross_entropy_cases as cases
from benchmarks import memory, timing

OP = "variable_width_cross_entropy"


def _parameters():
    return [
        pytest.param(name, kind, backward, id=f"{name}-{kind}-{'fwd+bwd' if backward else 'fwd'}")
        for kind in cases.KINDS
        for backward in (False, True)
        for name in cases.LABELS
    ]


@pytest.mark.parametrize(("name", "kind", "backward"), _parameters())
def test_variable_width_cross_entropy(benchmark, name, kind, backward) -> None:
    reason = cases.problem(name, kind)
    if reason is not None:
        pytest.skip(reason)
    cases.check(name, kind)
    call = timing.bound(*cases.prepare(name, kind), backward)
    benchmark.group = f"{OP} {kind} ids {'fwd+bwd' if backward else 'fwd'}"
    benchmark.extra_info.update(contender=name, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


def measure(kind: str, rounds: int) -> list[dict]:
    """One row per direction and contender: milliseconds, rounds of all contenders in turn."""
    names = [n for n in cases.LABELS if cases.problem(n, kind) is None]
    for name in names:
        cases.check(name, kind)
    rows = []
    for backward in (False, True):
        calls = {n: timing.bound(*cases.prepare(n, kind), backward) for n in names}
        times = timing.interleave(calls, budget=60, rounds=rounds, least=min(rounds, 3))
        ours = times["ours"].median
        rows += [
            {
                "op": OP,
                "ids": kind,
                "direction": "forward + backward" if backward else "forward",
                "contender": cases.LABELS[name],
                "milliseconds": 1e3 * times[name].median,
                "over_ours": times[name].median / ours,
                "target": cases.TARGETS.get(name) if backward else None,
            }
            for name in names
        ]
    return rows


def peak_memory(name: str, threads: int) -> dict:
    """MB beyond inputs of forward + backward, gradients included, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.widths", "--peak-of", name, "--threads", str(threads)]
    run = subprocess.run(command, cwd=memory.ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the memory measurement failed: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_here(name: str) -> dict:
    """What `peak_memory` asks of its process."""
    forward, leaves = cases.prepare(name, "zipf")
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    warm, few = cases.prepare(name, "zipf", 8)
    few = tuple(t.detach().requires_grad_() for t in few)
    torch.autograd.grad(warm(*few), few)  # thread pools and code
    del warm, few
    memory._forget_the_past()
    before, highest_before = memory._resident(), memory._highest()
    sampler = memory._Sampler()
    sampler.start()
    start = time.perf_counter()
    grads = torch.autograd.grad(forward(*leaves), leaves)
    seconds = time.perf_counter() - start
    sampler.over = True
    sampler.join()
    highest = memory._highest()
    peak = max(sampler.peak, highest) if highest > highest_before else sampler.peak
    returned = sum(g.numel() * g.element_size() for g in grads) / 1e6
    return {
        "contender": cases.LABELS[name],
        "extra_mb": max(0, peak - before) / 1e6,
        "of_which_gradients_mb": returned,
        "seconds": seconds,
    }
