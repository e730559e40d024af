"""Peak memory of one call beyond its inputs, outputs included, measured in a process of its own.

    python -m benchmarks.memory --op topk_attention --length 32768

The process makes the inputs, calls the op once on a short slice (so that thread pools and code are there),
notes its resident memory, makes the one call and takes the peak since. Nothing is subtracted for the outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent


def measure(op: str, length: int, *, dtype: str, backward: bool, threads: int) -> dict:
    """Runs the measurement in a fresh interpreter; raises RuntimeError with its last words."""
    command = [sys.executable, "-m", "benchmarks.memory", "--op", op, "--length", str(length)]
    command += ["--dtype", dtype, "--threads", str(threads), *(["--backward"] if backward else [])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the memory measurement failed: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


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


def _measure_here(case: Case, threads: int) -> dict:
    import torch

    from benchmarks import contenders, inputs

    torch.set_num_threads(threads)
    name = "sdpa" if case.op == "sdpa" else "ours"
    tensors = inputs.make(case.inputs, case.length, dtype=case.dtype)
    leaves = tuple(t.requires_grad_(case.backward) for t in tensors)

    def call(query, key, value, forward):
        out = forward(query, key, value)
        if not case.backward:
            return (out,)
        # An expanded scalar takes no memory of its own.
        return (out, *torch.autograd.grad(out, (query, key, value), out.new_ones(()).expand_as(out)))

    short = tuple(t.detach()[:, :, :256].contiguous().requires_grad_(case.backward) for t in tensors)
    call(*short, contenders.prepare(name, case, short))
    forward = contenders.prepare(name, case, tensors)  # gathered_attention: its indices are inputs
    start = time.perf_counter()
    results, extra = peak_of(lambda: call(*leaves, forward))
    seconds = time.perf_counter() - start
    return {
        "op": case.op,
        "length": case.length,
        "dtype": case.dtype,
        "direction": case.direction,
        "extra_mb": extra / 1e6,
        "of_which_returned_mb": sum(t.numel() * t.element_size() for t in results) / 1e6,
        "inputs_mb": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "score_matrix_mb": case.heads * case.length**2 * 4 / 1e6,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=("topk_attention", "gathered_attention", "sdpa"), required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    case = Case(args.op, args.length, dtype=args.dtype, backward=args.backward)
    print(json.dumps(_measure_here(case, args.threads)))


if __name__ == "__main__":
    main()
