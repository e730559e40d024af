"""Time and memory on a GPU: events, a cold second-level cache, medians; and one comparison of several contenders."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.bench.timing import bound
from sparse_attn.wings.base import choose, reasons

FLUSH_BYTES = 256 << 20  # more than any second-level cache


@dataclass(frozen=True)
class Device:
    """Where to measure. A dry run has no GPU and times nothing: every call runs once, on tiny shapes."""

    name: str
    dry: bool = False
    budget: float = 1.0  # seconds for one contender's timing

    def synchronize(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """One call by the host's clock, everything included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def milliseconds(self, call: Callable[[], object]) -> tuple[float, float] | None:
        """(median, spread between the quartiles) of one call with a cold cache; None in a dry run."""
        if self.dry:
            call()
            return None
        once = min(self.seconds(call) for _ in range(3))
        rounds = max(5, min(50, int(self.budget / max(once, 1e-5))))
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.name)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        times = [start.elapsed_time(end) for start, end in pairs]
        low, middle, high = statistics.quantiles(times, n=4)
        return middle, high - low

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """What the call allocates at once above what is there already."""
        if self.name != "cuda":
            call()
            return None
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def wings_of(op: str, device: Device) -> dict[str, str]:
    """Name of the contender → the wing that it is: "ours" is what users get by default, the other by its name."""
    if device.dry:
        return {"ours": "triton"}
    example = torch.empty(0, device=device.name, dtype=torch.bfloat16)
    there = [w for w, why in reasons(op, example.device, example.dtype).items() if why is None]
    default = choose(op, example, None)
    others = (w for w in ("cuda", "triton") if w in there and w != default)
    return {"ours": default, **{f"ours_{wing}": wing for wing in others}}


@dataclass
class Contender:
    """`make()` → the forward of the leaves. What it needs first (index tables, compiled graphs) is made there."""

    make: Callable[[], Callable[..., Tensor]]
    leaves: tuple[Tensor, ...]
    check: Callable[[Callable[..., Tensor]], None] | None = None


def compare(
    section: str,
    case: str,
    contenders: dict[str, Contender],
    device: Device,
    directions: tuple[str, ...] = ("forward",),
) -> Iterator[dict]:
    """One row per contender and direction: checked first, then timed; a failure is its row and stops no other."""
    for name, contender in contenders.items():
        row = {"section": section, "case": case, "contender": name}
        try:
            forward = contender.make()
            for direction in directions:
                call = bound(forward, contender.leaves, direction)
                first = device.seconds(call)  # compiles, where the check has not yet
                if contender.check is not None and direction == directions[0]:
                    contender.check(forward)
                peak, median, spread = None, None, None
                if not device.dry:
                    peak = device.peak_bytes(call)
                    median, spread = device.milliseconds(call)
                del call
                facts = {"ms": median, "spread_ms": spread, "peak_bytes": peak, "first_call_s": first}
                yield {**row, "direction": direction, **facts}
        except Exception as error:  # what fails is a finding too
            text = traceback.format_exception_only(error)[-1].strip()
            yield {**row, "direction": directions[-1], "error": text[:600]}
        if device.name == "cuda":
            torch.cuda.empty_cache()


def ratios(rows: list[dict]) -> None:
    """Adds `times_ours`: how many times as long as ours each rival takes, in the same case and direction."""
    ours = {
        (r["section"], r["case"], r["direction"]): r["ms"]
        for r in rows
        if r["contender"] == "ours" and r.get("ms")
    }
    for row in rows:
        mine = ours.get((row["section"], row["case"], row["direction"]))
        if row.get("ms") and mine and row["contender"] != "ours":
            row["times_ours"] = row["ms"] / mine


def ceilings(device: Device) -> list[dict]:
    """What this device reaches: a large copy (bytes read and written), and a large bfloat16 product."""
    size = 1 << (8 if device.dry else 13)
    source = torch.randn(4 * size, size, device=device.name)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device.name, dtype=torch.bfloat16)
    copy, product = device.milliseconds(lambda: target.copy_(source)), device.milliseconds(lambda: a @ a)
    facts = {"section": "ceilings", "case": "", "direction": "forward"}
    return [
        {**facts, "contender": "copy", "gigabytes_per_s": copy and 2 * source.nbytes / copy[0] / 1e6},
        {**facts, "contender": "matmul", "teraflops": product and 2 * size**3 / product[0] / 1e9},
    ]
