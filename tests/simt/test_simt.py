"""The simulated GPU itself: it finds what is wrong with a kernel, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch

from simt import device
from simt.device import SCHEDULES, Device

pytestmark = pytest.mark.skipif(device.why_not() is not None, reason=str(device.why_not()))

BLOCKS, THREADS = 2, 64
FAULTS = {  # number in faulty.cu → what the message says
    1: "race: |read of shared memory at byte .* where nothing was written",
    2: "race: write of shared memory|race: read of shared memory",
    3: "race: read of shared memory|race: write of shared memory|where nothing was written",
    4: r"out of bounds: write of 4 bytes of device memory",
    5: r"out of bounds: write of 4 bytes of shared memory at byte 256",
    6: "read of device memory at byte .* where nothing was written",
    7: "read of shared memory at byte .* where nothing was written",
    8: "divergent warp: __shfl_.* while other lanes are at __shfl_",
    9: "waits at __syncthreads, which other threads do not reach",
    10: "misaligned read of 8 bytes of device memory",
    11: "race: write of device memory",
    12: "where nothing was written",
    13: "race: |where nothing was written",
}


def run(fault: int, schedule: int, threads: int = THREADS) -> tuple[torch.Tensor, torch.Tensor]:
    gpu = Device(schedule)
    given = torch.arange(BLOCKS * threads, dtype=torch.int32)
    # The correct kernel counts its threads beside the result, from 0.
    out = gpu.put(torch.zeros(given.numel() + 1, dtype=torch.int32)) if fault == 0 else None
    if out is None:
        out = gpu.empty((given.numel(),), torch.int32)
    else:
        gpu._made[out] = torch.empty(given.numel() + 1, dtype=torch.int32)
    gpu.run("run_faulty", gpu.put(given), out, BLOCKS, threads, fault)
    return given, gpu.get(out)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", [0, 14])
def test_a_correct_kernel_passes(fault, schedule):
    given, out = run(fault, schedule)
    assert torch.equal(out[: given.numel()], given.view(BLOCKS, THREADS).roll(1, 1).flatten())
    assert fault or out[-1] == BLOCKS * THREADS


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, schedule):
    with pytest.raises(RuntimeError, match=FAULTS[fault]) as found:
        run(fault, schedule)
    assert "thread (" in str(found.value)


def test_a_launch_that_no_gpu_takes():
    with pytest.raises(RuntimeError, match="invalid configuration: grid 2 × 1 × 1, 2048 threads"):
        run(0, 0, 2048)
