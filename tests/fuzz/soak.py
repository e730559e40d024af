"""Hours of mixed calls from four Python threads: each call's bits are the same every time, and memory stays flat."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fuzz import case as cases
from fuzz.case import OPS, Case, bits, check_case, draw_case
from fuzz.worker import prepare

THREADS = 4
CALLS = 400  # different ones
FLAT = 64 * 2**20  # bytes an hour that the allocators' own ups and downs may look like …
LEAST = 8 * 2**20  # … and bytes in all, of a short run
WARM = 0.25  # of the time passes before memory is looked at


class Done(Exception):
    """The call has been made; its check is of no interest here."""


def digest(function: Any, *arguments: Any, **options: Any) -> str:
    """Of the results, and of the gradients of whatever wants one."""
    results = [t for t in tree_leaves(function(*arguments, **options)) if isinstance(t, Tensor)]
    leaves = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [t for t in results if t.requires_grad]
    if leaves and wanted:
        ones = [torch.ones_like(t) for t in wanted]
        found = torch.autograd.grad(wanted, leaves, ones, allow_unused=True)
        results += [g for g in found if g is not None]
    text = hashlib.sha1()
    for tensor in results:
        text.update(bits(tensor).numpy().tobytes())
    raise Done(text.hexdigest())


def observe(case: Case) -> str:
    """The digest of the case's first call; "" where its check makes none."""
    try:
        check_case(case)
    except Done as done:
        return str(done)
    return ""


def resident() -> int:
    """Bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Soak:
    def __init__(self, seed: int) -> None:
        ops = [name for name in OPS if name != "torch.ops"]
        drawn = (draw_case(seed, n, ops, large=0.1) for n in range(10 * CALLS))
        self.cases = [c | {"threads": 2} for c in drawn if c["wing"] == "cpu"][:CALLS]
        self.expected = [observe(case) for case in self.cases]
        self.made, self.wrong, self.stop = [0] * THREADS, [], threading.Event()

    def work(self, thread: int) -> None:
        order = random.Random(thread)
        while not self.stop.is_set():
            number = order.randrange(len(self.cases))
            try:
                found = observe(self.cases[number])
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found != self.expected[number]:
                self.wrong.append((number, found))
            self.made[thread] += 1


def main(seed: int, seconds: float, memory: bool = True) -> int:
    prepare()
    cases.instead = digest
    soak = Soak(seed)
    threads = [threading.Thread(target=soak.work, args=(n,), daemon=True) for n in range(THREADS)]
    started, samples = time.time(), []
    for thread in threads:
        thread.start()
    while (passed := time.time() - started) < seconds and not soak.wrong:
        time.sleep(min(5.0, max(0.2, seconds / 100)))
        gc.collect()
        samples.append((time.time() - started, resident()))
        filled = int(30 * min(1.0, passed / seconds))
        text = (
            f"[{'#' * filled}{'.' * (30 - filled)}] {sum(soak.made)} calls, {samples[-1][1] / 2**20:.0f} MiB"
        )
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif len(samples) % 12 == 1:
            print(text, file=sys.stderr, flush=True)
    soak.stop.set()
    for thread in threads:
        thread.join()
    return report(soak, samples, seconds, memory)


def report(soak: Soak, samples: list[tuple[float, int]], seconds: float, memory: bool) -> int:
    times, sizes = np.array([s for s in samples if s[0] >= WARM * seconds] or samples, dtype=float).T
    slope, about = np.polyfit(times, sizes, 1) if len(times) > 2 else (0.0, sizes[0])
    spread = float(np.abs(sizes - (slope * times + about)).max()) if len(times) > 2 else 0.0
    # A line through noise is never flat: what it rises over the run must stand out of the noise, too.
    risen = slope * (times[-1] - times[0])
    leaks = memory and slope * 3600 > FLAT and risen > LEAST + 2 * spread
    print(
        f"\n{sum(soak.made)} calls from {THREADS} threads in {seconds:.0f} s ({len(soak.cases)} different ones)"
    )
    print(
        f"resident memory {sizes[0] / 2**20:.1f} MiB at {times[0]:.0f} s, {sizes[-1] / 2**20:.1f} MiB at the end: "
        f"{slope * 3600 / 2**20:+.1f} MiB an hour, within {spread / 2**20:.1f} MiB of that line"
    )
    for number, found in soak.wrong[:5]:
        print(f"FAILED another result: {found}\n    {soak.cases[number]}")
    if leaks:
        print("FAILED memory grows")
    return 1 if soak.wrong or leaks else 0
