"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference and the oracle.

Kernels are interpreted or compiled for good when they are defined, so this takes processes of its own: two, each with
half of the files. By hand: TRITON_INTERPRET=1 pytest tests/triton_wing/interpreted (or any file of tests/ops: in such
a session the fixture `wing` is the Triton wing alone).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

from sparse_attn.wings import triton as triton_wing

HERE = Path(__file__).resolve().parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"), key=lambda path: (-path.stat().st_size, path.name))
HALVES = FILES[::2], FILES[1::2]
LIMIT = 1800  # seconds: many times what it takes, so that a kernel that hangs is a failure

# Seen with Triton 3.6 and NumPy 2.4: the interpreter turns arrays of one element into ints, which NumPy gave up.
OLD = (triton_wing.version or (0,)) <= (3, 6) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        OLD, reason="the interpreter of Triton up to 3.6 does not run with NumPy 2.4 or later"
    ),
    pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton_wing.interpreted, reason="this session interprets already"),
]


def run_files(half: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *HALVES[half]],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture(scope="module")
def runs(request) -> Iterator[dict[int, Future]]:
    """The halves that this session asks for, both at once: the interpreter leaves the second core idle.

    One of several processes of a test run (pytest-xdist) does not know which of them are its own.
    """
    asked = [i.callspec.params["half"] for i in request.session.items if i.originalname == "test_interpreted"]
    with ThreadPoolExecutor(len(HALVES)) as pool:
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        yield {half: pool.submit(run_files, half) for half in asked if alone}


@pytest.mark.parametrize("half", range(len(HALVES)))
def test_interpreted(half, runs):
    run = runs[half].result() if half in runs else run_files(half)
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    assert re.search(r"\d+ passed", run.stdout), run.stdout
    print(run.stdout.strip().splitlines()[-1])
