"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference and the oracle.

Kernels are interpreted or compiled for good when they are defined, so this takes processes of its own, one for each
file. By hand: TRITON_INTERPRET=1 pytest tests/triton_wing/interpreted (or any file of tests/ops: in such a session
the fixture `wing` is the Triton wing alone).
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
FILES = sorted((HERE / "interpreted").glob("test_*.py"))
PROCESSES = 2
LIMIT = 900  # seconds for one file: many times what it takes, so that a kernel that hangs is a failure

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


def run_file(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture(scope="module")
def runs(request) -> Iterator[dict[Path, Future]]:
    """The files that this session asks for, two at once: the interpreter leaves the second core idle.

    One of several processes of a test run (pytest-xdist) does not know which of them are its own.
    """
    asked = [i.callspec.params["path"] for i in request.session.items if i.originalname == "test_interpreted"]
    with ThreadPoolExecutor(PROCESSES) as pool:
        alone = "PYTEST_XDIST_WORKER" not in os.environ
        futures = {path: pool.submit(run_file, path) for path in sorted(asked, key=longest_first) if alone}
        yield futures
        for future in futures.values():
            future.cancel()


def longest_first(path: Path) -> int:
    return -path.stat().st_size


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("test_"))
def test_interpreted(path, runs):
    run = runs[path].result() if path in runs else run_file(path)
    assert run.returncode == 0, f"{path.name}:\n{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert re.search(r"\d+ passed", run.stdout), run.stdout
    print(run.stdout.strip().splitlines()[-1])
