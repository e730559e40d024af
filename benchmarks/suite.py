"""The pytest-benchmark suite of an op, from its case file.

`bench_<op>.py` holds the suite of one op, so that it can be named on the command line. An op that has no such file is
measured too: its suite is made here, where pytest collects it (`pytest benchmarks -k <op>`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_attn.bench import registry, timing


def suite_of(name: str) -> Callable:
    """The test of `name`, once per contender and case: skipped with the reason, or checked and then timed."""
    op = registry.op(name)
    cases = op.cases()
    ids = [str(case).replace(" ", "-") for case in cases]

    @pytest.mark.parametrize("case", cases, ids=ids)
    @pytest.mark.parametrize("contender", op.labels)
    def test(benchmark, request, contender, case) -> None:
        longest = request.config.getoption("--max-length")
        if getattr(case, "length", 0) > longest:
            pytest.skip(f"sequences past T={longest}, by --max-length")
        reason = op.inputs_problem(case) or op.problem(contender, case)
        if reason is not None:
            pytest.skip(reason)
        inputs = op.inputs(case)
        work = op.prepare(contender, case, inputs)
        op.check(contender, case, inputs, work)
        call = timing.bound(work.forward, work.leaves, case.direction)
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        benchmark.group = str(case)
        benchmark.extra_info.update(contender=contender, case=str(case), threads=torch.get_num_threads())
        benchmark.pedantic(
            call,
            rounds=max(2, min(50, int(request.config.getoption("--seconds") / once))),
            iterations=max(1, math.ceil(timing.SHORTEST_SAMPLE / once)),
        )

    return test


for _name in registry.names():
    if not (Path(__file__).parent / f"bench_{_name}.py").exists():
        globals()[f"test_{_name}"] = suite_of(_name)
