"""A few seconds of the fuzzer (tests/fuzz), the same cases every time, and that it finds what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import shrink, worker
from fuzz.case import OPS, draw_case, load

import sparse_attn

TESTS = Path(__file__).parent


def fuzz(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_same_cases_every_time():
    """Every op, wing and instruction set of this machine; in processes, so that one that dies is a failure."""
    result = fuzz("--seed", "0", "--cases", "1200", "--jobs", "2")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "1200 cases in" in result.stdout


def test_a_wrong_result_is_found_and_made_small(monkeypatch):
    """Of a selection that forgets the last key."""
    load()
    right = sparse_attn.topk_select

    def wrong(query, key, top_k, **options):
        return right(query, key[:, :, : max(1, key.shape[2] - 1)], top_k, **options)

    monkeypatch.setattr(sparse_attn, "topk_select", wrong)
    cases = (draw_case(0, number, ["topk_select"]) for number in range(300))
    case = next(c for c in cases if c["B"] and c["Tk"] > 3 and worker.failure(c))
    small, problem = shrink.shrink(case)
    assert problem is not None
    assert small["B"] * small["Tq"] * small["D"] <= case["B"] * case["Tq"] * case["D"]
    assert small["B"] == small["Tq"] == small["Hq"] == 1
    assert OPS[small["op"]].name == "topk_select"


def test_a_failure_comes_with_its_command():
    """Here every call fails: there is no such instruction set."""
    result = fuzz("--seed", "3", "--cases", "20", "--ops", "topk_select", "--isas", "no_such_set")
    assert result.returncode == 1
    assert "SPARSE_ATTN_CPU_ISA must be" in result.stdout
    command = "SPARSE_ATTN_CPU_ISA=no_such_set python -m fuzz --seed 3 --ops topk_select --case "
    assert command in result.stdout
