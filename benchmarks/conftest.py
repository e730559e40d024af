"""What the three pytest-benchmark suites share.

pytest benchmarks                                      all of them
pytest benchmarks/bench_topk_attention.py --max-length 4096 --threads 2 --seconds 0.5
"""

from __future__ import annotations

import math
import time

import pytest
import torch

from benchmarks import cases, contenders, inputs, timing
from benchmarks.correctness import check


def pytest_addoption(parser) -> None:
    group = parser.getgroup("sparse_attn benchmarks")
    group.addoption("--max-length", type=int, default=8192, help="leave out longer sequences (default 8192)")
    group.addoption("--threads", type=int, default=min(2, inputs.cores()), help="torch threads (default 2)")
    group.addoption(
        "--seconds", type=float, default=1.0, help="timing per test, at least 2 rounds (default 1)"
    )


def pytest_configure(config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_report_header(config) -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_generate_tests(metafunc) -> None:
    if "case" in metafunc.fixturenames:
        longest = metafunc.config.getoption("--max-length")
        chosen = [c for c in cases.suite(metafunc.module.OP) if c.length <= longest]
        metafunc.parametrize("case", chosen, ids=[str(c).replace(" ", "-") for c in chosen])
    if "contender" in metafunc.fixturenames:
        metafunc.parametrize("contender", metafunc.module.CONTENDERS)


@pytest.fixture
def run(benchmark, request):
    """`run(contender, case)`: skips with the reason, checks the result, then times."""

    def run(contender: str, case: cases.Case) -> None:
        reason = contenders.why_not(contender, case) or inputs.why_not(case.inputs, case.length)
        if reason is not None:
            pytest.skip(reason)
        tensors = inputs.make(case.inputs, case.length, dtype=case.dtype)
        forward = contenders.prepare(contender, case, tensors)
        check(contender, case, forward, tensors)
        call = timing.bound(forward, tensors, case.backward)
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        seconds = request.config.getoption("--seconds")
        benchmark.group = str(case)
        benchmark.extra_info.update(contender=contender, case=str(case), threads=torch.get_num_threads())
        benchmark.pedantic(
            call,
            rounds=max(2, min(50, int(seconds / once))),
            iterations=max(1, math.ceil(timing.SHORTEST_SAMPLE / once)),
        )

    return run
