"""Peak memory of one call beyond its inputs, outputs included, measured in a process of its own.

The process makes the inputs, calls the op once on little (so that thread pools and code are there), notes its resident
memory, makes the one call and takes the peak since. Nothing is subtracted for the outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from pathlib import Path

import torch

from sparse_attn.bench import registry
from sparse_attn.bench.process import alone
from sparse_attn.bench.registry import Peak, Work


def measure(peak: Peak, threads: int) -> dict:
    """Megabytes, in a fresh interpreter."""
    return alone(_measure_here, peak, threads)


def _status(field: str) -> int:
    """Bytes of this process: VmRSS is resident now, VmHWM the peak. 0 where the system does not tell."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _resident() -> int:
    return _status("VmRSS") or _highest()


def _highest() -> int:
    # Not ru_maxrss where there is VmHWM: it starts at the peak of the parent process.
    peak = _status("VmHWM")
    if peak:
        return peak
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_the_past() -> None:
    """Gives freed memory back, so that the call cannot reuse it unseen, and restarts the peak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class _Sampler(threading.Thread):
    """The peak of the resident memory, read every millisecond: ops release the interpreter lock."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, False

    def run(self) -> None:
        while not self.over:
            self.peak = max(self.peak, _resident())
            time.sleep(0.001)


def peak_of(call):
    """(what `call()` returns, bytes of resident memory that it took beyond those before, its result included)."""
    _forget_the_past()
    before, highest_before = _resident(), _highest()
    sampler = _Sampler()
    sampler.start()
    try:
        result = call()
    finally:
        sampler.over = True
        sampler.join()
    # The kernel's own high-water mark misses nothing, but counts an earlier peak where there was one.
    highest = _highest()
    peak = max(sampler.peak, highest) if highest > highest_before else sampler.peak
    return result, max(0, peak - before)


def _measure_here(peak: Peak, threads: int) -> dict:
    torch.set_num_threads(threads)
    op, case = registry.op(peak.case.op), peak.case
    _results(op.warm_up(peak.contender, case), case.direction)
    work = op.prepare(peak.contender, case, op.inputs(case))  # gathered_attention: its indices are inputs
    start = time.perf_counter()
    results, extra = peak_of(lambda: _results(work, case.direction))
    return {
        "extra_mb": extra / 1e6,
        "of_which_returned_mb": _megabytes(results),
        "inputs_mb": _megabytes(work.leaves),
        "seconds": time.perf_counter() - start,
    }


def _results(work: Work, direction: str) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients where they are asked for."""
    if direction == "forward":
        with torch.no_grad():
            return (work.forward(*work.leaves),)
    leaves = tuple(t.detach().requires_grad_() for t in work.leaves)
    out = work.forward(*leaves)
    # An expanded scalar takes no memory of its own.
    return (out, *torch.autograd.grad(out, leaves, out.new_ones(()).expand_as(out)))


def _megabytes(tensors: tuple[torch.Tensor, ...]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6
