"""The options of the pytest-benchmark suites.

pytest benchmarks                                      all of them
pytest benchmarks/bench_topk_attention.py --max-length 4096 --threads 2 --seconds 0.5
"""

from __future__ import annotations

import torch

from sparse_attn.bench import inputs


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
