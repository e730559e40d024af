"""No wing reads beyond its inputs: they lie against protected memory, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROBE = """
import ctypes, torch
from helpers.guarded import guarded
tensor = guarded(torch.ones(4), at_end=True)
print(ctypes.string_at(tensor.data_ptr(), 16 + {beyond}))
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    # MALLOC_PERTURB_ fills what the C library hands out: scratch memory of a kernel is not torch's to poison.
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "MALLOC_PERTURB_": "128"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="protected pages as Linux has them")
def test_reads_stay_inside(wing):
    if wing.device != "cpu":
        pytest.skip("memory of the host is what can be protected here")
    # Plain PyTorch needs no proof in every dtype.
    dtypes = wing.dtypes[:1] if wing.name == "reference" else wing.dtypes
    dtypes = [str(d).removeprefix("torch.") for d in dtypes]
    result = python("-m", "helpers.guarded", wing.name, *dtypes)
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, f"died (signal {-result.returncode}) at {last}\n{result.stderr[-3000:]}"


@pytest.mark.skipif(sys.platform != "linux", reason="protected pages as Linux has them")
def test_a_read_outside_would_be_noticed():
    assert python("-c", PROBE.format(beyond=0)).returncode == 0
    assert python("-c", PROBE.format(beyond=1)).returncode < 0
