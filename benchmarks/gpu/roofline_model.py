"""The model of the roofline: what a kernel issues, by its loops and how often they turn, and the time that follows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.gpus import GPUS, Gpu, resident
from benchmarks.gpu.sass import Kernel, Loop


@dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    label: str
    source: str  # of csrc/cuda/kernels
    kernel: str  # its demangled name
    unit: str  # what is counted: "4,096 scores", "query and key"
    units: float  # how many there are of them
    warps: int  # of a block
    blocks: float  # that do the work counted by `turns`
    shared: int  # bytes of a block
    turns: Callable[[Loop, tuple[Loop, ...]], float]  # of a loop, for each turn of those around it
    operations: float  # of products
    halves: bool  # on tensor cores
    cache_bytes: float
    memory_bytes: float
    # Of a block that a turn of a loop may pass by, with the loops around it.
    weight: Callable[[Loop, Counter, tuple[Loop, ...]], float]


@dataclass
class Row:
    label: str
    registers: int
    stack: int
    shared: int
    warps: int  # of a multiprocessor of an H100, by registers and shared memory
    loop: int  # instructions of the main loop that every turn issues
    loop_most: int  # with all that a turn may pass by
    per_unit: float  # warp instructions
    unit: str
    instructions: float  # of warps, in all
    operations: float
    cache_bytes: float
    memory_bytes: float
    milliseconds: dict[str, float]
    bound: dict[str, str]


def issued(loops: list[Loop], case: Case, around: tuple[Loop, ...] = ()) -> float:
    """Instructions of one warp in these loops, for one turn of those around them."""
    total = 0.0
    for loop in loops:
        turns = case.turns(loop, around)
        if turns:
            own = loop.always.total() + sum(case.weight(loop, b, around) * b.total() for b in loop.branches)
            total += turns * (own + issued(loop.inner, case, (*around, loop)))
    return total


def main_loop(kernel: Kernel) -> Loop:
    """The loop with the most tensor work, else with the most multiply-adds."""

    def products(loop: Loop) -> tuple[float, ...]:
        return tensor_macs(loop), loop.count("FFMA")

    return max(kernel.all_loops(), key=products)


def tensor_macs(loop: Loop) -> float:
    """Multiply-adds of one warp's turn on the tensor cores."""
    total = 0.0
    for op, n in (loop.always + loop.sometimes).items():
        if op.startswith("HMMA.16816"):
            total += n * 16 * 8 * 16
        elif op.startswith("IMMA.16832"):
            total += n * 16 * 8 * 32
        elif match := re.match(r"[HI]GMMA\.64x(\d+)x(\d+)", op):
            total += n * 64 * int(match[1]) * int(match[2]) / 4  # four warps have a part each
    return total


def times(
    instructions: float, operations: float, rate: Callable[[Gpu], float], cache: float, memory: float
) -> tuple[dict, dict]:
    milliseconds, bound = {}, {}
    for gpu in GPUS:
        clocks = gpu.processors * gpu.clock * 1e9
        terms = {
            "issue": instructions / (4 * clocks),
            "product": operations / (rate(gpu) * clocks),
            "cache": cache / (gpu.cache * 1e12),
            "memory": memory / (gpu.memory * 1e12),
        }
        bound[gpu.name] = max(terms, key=terms.__getitem__)
        milliseconds[gpu.name] = 1e3 * terms[bound[gpu.name]]
    return milliseconds, bound


def row_of(case: Case, kernel: Kernel) -> Row:
    per_warp = issued(kernel.loops, case)
    total = per_warp * case.warps * case.blocks
    loop = main_loop(kernel)
    milliseconds, bound = times(
        total,
        case.operations,
        lambda gpu: gpu.legacy if case.halves else gpu.multiply_add,
        case.cache_bytes,
        case.memory_bytes,
    )
    return Row(
        case.label, kernel.registers, kernel.stack, case.shared,
        resident(kernel.registers, case.shared, case.warps, GPUS[1]), loop.always.total(),
        loop.always.total() + loop.sometimes.total(), total / case.units, case.unit, total, case.operations,
        case.cache_bytes, case.memory_bytes, milliseconds, bound,
    )  # fmt: skip
