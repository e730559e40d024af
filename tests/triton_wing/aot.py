"""Compiles Triton kernels for GPUs that are not here, and reads from the object what each needs.

A file `aot_<op>.py` beside this one has a function `cases()` that lists the kernels of its op as they are launched:

    aot.Case("forward bf16 D128", kernel, {"query": "*bf16", "length": 16384, "scale": 0.1, "BLOCK": 64}, num_warps=4)

By hand: PYTHONPATH=.:tests python -m triton_wing.aot [op …] compiles every case for each of its targets and prints the
table. The tests look at fewer (`main_jobs`), and of those compile only what is not in the record beside this file: what
one compiler makes of one source does not change. `--write` brings it up to date, after kernels or Triton changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "aot_record.json"
PROCESSES = 2
# Bytes: one address, which ptxas puts away to fit one more block on a multiprocessor. Which kernels that befalls
# changes with its version; the table shows it.
TOLERATED_SPILL = 8

# target → (Triton's backend, architecture, lanes of a warp, bytes of shared memory for one block)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
MAIN_TARGET = "sm_90"


@dataclass(frozen=True)
class Case:
    """One kernel as one launch specialises it.

    `arguments` has for each parameter of the kernel a pointer type ("*bf16"), a number or None: as Triton does at
    a launch, an int that is 1 is compiled in and one that 16 divides is known to be so.
    """

    name: str
    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    candidate: bool = False  # that tuning tries beside the first: on the main target alone it must not spill
    targets: tuple[str, ...] = tuple(TARGETS)
    options: dict[str, Any] = field(default_factory=dict)  # of the launch beside these

    def source(self):
        """What Triton compiles."""
        from triton.compiler import ASTSource

        parameters = {p.name: p for p in self.kernel.params}
        missing = [n for n in parameters if n not in self.arguments]
        unknown = [n for n in self.arguments if n not in parameters]
        if missing or unknown:
            raise TypeError(f"{self.name}: the kernel misses {missing}, and does not have {unknown}")
        signature, constants, attributes = {}, {}, {}
        for place, (name, parameter) in enumerate(parameters.items()):
            value = self.arguments[name]
            kind, divisible = _specialise(value, parameter.do_not_specialize)
            signature[name] = "constexpr" if parameter.is_constexpr else kind
            if signature[name] == "constexpr":
                constants[(place,)] = value
            elif divisible:
                attributes[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def _specialise(value, plain: bool) -> tuple[str, bool]:
    """The type in the signature, and whether 16 divides it; `plain` is the kernel's do_not_specialize."""
    if isinstance(value, str):
        return value, not plain
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1 and not plain):
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0 and not plain
    return "fp32", False


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    op: str
    case: str
    target: str
    registers: int = 0  # of one thread (gfx942: vector registers)
    spilled: int = 0  # bytes of local memory of one thread
    shared: int = 0  # bytes of shared memory of one block
    spare: bool = False  # a candidate of tuning on another than the main target: it may spill, or not fit
    seconds: float = 0.0  # of compiling
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        if self.error:
            return [self.error]
        limit = TARGETS[self.target][3]
        found = []
        if self.shared > limit and not self.spare:
            found.append(f"{self.shared} bytes of shared memory, {limit} are there")
        if self.spilled > TOLERATED_SPILL and not self.spare and not old_compiler():
            found.append(f"{self.spilled} bytes spilled")
        return found


def old_compiler() -> bool:
    """Whether Triton is older than 3.7, which spills where later ones do not: the table shows it."""
    from sparse_attn.wings import triton as triton_wing

    return (triton_wing.version or (0,)) < (3, 7)


def ops() -> list[str]:
    return sorted(path.stem.removeprefix("aot_") for path in HERE.glob("aot_*.py"))


@lru_cache
def cases(op: str) -> list[Case]:
    return import_module(f"{__package__ or 'triton_wing'}.aot_{op}").cases()


def compile_case(op: str, number: int, target: str) -> Resources:
    """Compiles one case for one target; runs in a worker process."""
    return compile_one(op, cases(op)[number], target)


def compile_one(op: str, case: Case, target: str) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget

    backend, architecture, lanes, _ = TARGETS[target]
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            case.source(),
            target=GPUTarget(backend, architecture, lanes),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options},
        )
        seconds = time.perf_counter() - start
        read = _read_cubin if backend == "cuda" else _read_amdgcn
        registers, spilled = read(compiled.asm)
        shared = compiled.metadata.shared
    except Exception as error:  # the finding of this case; the others go on
        text = f"{type(error).__name__}: {error}"
        return Resources(op, case.name, target, error=text[-1500:])
    spare = case.candidate and target != MAIN_TARGET
    return Resources(op, case.name, target, registers, spilled, shared, spare, seconds)


def _cuobjdump() -> str:
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump is neither beside Triton nor on the PATH")
    return found


def _read_cubin(asm) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        run = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, local = (
        int(re.search(rf"\b{what}:(\d+)", run.stdout)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    # What LLVM itself puts on the stack (it packs long rows of bits there) is no register that ptxas put away.
    own = sum(int(n) for n in re.findall(r"\.local .*__local_depot\d+\[(\d+)\]", asm["ptx"]))
    return registers, max(0, stack + local - own)


def _read_amdgcn(asm) -> tuple[int, int]:
    text = asm["amdgcn"]
    read = {n: int(v) for n, v in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text)}
    # Scalar registers are put away in lanes of vector registers, without memory: those are no spills.
    return read["vgpr_count"], read["private_segment_fixed_size"]


Job = tuple[str, int, str]  # op, number of the case, target


def all_jobs(of: list[str]) -> list[Job]:
    """Every case of these ops for each of its targets."""
    return [(op, i, target) for op in of for i, case in enumerate(cases(op)) for target in case.targets]


def main_jobs(of: list[str]) -> list[Job]:
    """Every case but the candidates for one target, and each kernel's first case, the main one, for the others."""
    found, seen = [], set()
    for op, i, target in all_jobs(of):
        case = cases(op)[i]
        if (target == MAIN_TARGET and not case.candidate) or (case.kernel, target) not in seen:
            found.append((op, i, target))
        seen.add((case.kernel, target))
    return found


def sample(jobs: list[Job]) -> list[Job]:
    """Of each op its last case on one target."""
    return list({op: (op, i, target) for op, i, target in jobs if target == MAIN_TARGET}.values())


def fingerprint(job: Job) -> str:
    """Of all that decides what comes out: the compiler, the source with all that it calls, the case."""
    import triton

    op, number, target = job
    case = cases(op)[number]
    of = (triton.__version__, case.source().hash(), TARGETS[target], case.num_warps, case.num_stages)
    return hashlib.sha256(repr((of, sorted(case.options.items()))).encode()).hexdigest()[:16]


def read_record() -> dict[str, tuple[int, int, int]]:
    """Fingerprint → registers, bytes spilled, bytes of shared memory."""
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    return {mark: (registers, spilled, shared) for _, mark, registers, spilled, shared in rows}


def write_record() -> list[Resources]:
    """What each op's test looks up, a kernel that two of them launch in both; only what is not known is compiled."""
    jobs, record = [job for op in ops() for job in main_jobs([op])], read_record()
    _, missing = looked_up(jobs, record)
    compiled = list(compile_jobs(missing))
    for job, r in zip(missing, compiled, strict=True):
        if not r.error:
            record[fingerprint(job)] = r.registers, r.spilled, r.shared
    lines = [
        json.dumps([f"{op}: {cases(op)[number].name}, {target}", mark, *record[mark]])
        for op, number, target in jobs
        if (mark := fingerprint((op, number, target))) in record
    ]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return looked_up(jobs, record)[0] + [r for r in compiled if r.error]


def looked_up(jobs: list[Job], record: dict[str, tuple[int, int, int]]) -> tuple[list[Resources], list[Job]]:
    """What the record has of these jobs, and the jobs that it does not have."""
    found, missing = [], []
    for job in jobs:
        op, number, target = job
        case, known = cases(op)[number], record.get(fingerprint(job))
        if known is None:
            missing.append(job)
            continue
        spare = case.candidate and target != MAIN_TARGET
        found.append(Resources(op, case.name, target, *known, spare))
    return found, missing


def compile_jobs(jobs: list[Job]) -> Iterator[Resources]:
    """In order, as they get ready."""
    left = list(jobs)
    while left:
        try:
            for found in _compiled(tuple(left), PROCESSES):
                del left[0]
                yield found
        except BrokenProcessPool:
            # A compiler that fails an assertion takes its process with it: was it this job's?
            job = left.pop(0)
            try:
                yield next(_compiled([job], 1))
            except BrokenProcessPool:
                op, number, target = job
                yield Resources(op, cases(op)[number].name, target, error="the compiler ended its process")


def _compiled(jobs: Sequence[Job], processes: int) -> Iterator[Resources]:
    # A fresh interpreter for each worker: a fork of a process with threads may hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*jobs, strict=True))


def table(rows: list[Resources]) -> str:
    """One line per kernel, three numbers per target."""
    found: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        found.setdefault((row.op, row.case), {})[row.target] = row
    width = max(len(f"{op}: {case}") for op, case in found)
    lines = [
        " " * width + "".join(f"{t:>20}" for t in TARGETS),
        " " * width + "      reg  spill  smem" * len(TARGETS),
    ]
    for (op, case), by_target in found.items():
        line = f"{op}: {case}".ljust(width)
        for target in TARGETS:
            r = by_target.get(target)
            text = (
                "–" if r is None else "ERROR" if r.error else f"{r.registers:>4}{r.spilled:>7}{r.shared:>7}"
            )
            line += text.rjust(20)
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels ahead of time.")
    parser.add_argument("op", nargs="*", help="of these ops alone")
    parser.add_argument("--write", action="store_true", help=f"what the tests look at, into {RECORD.name}")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sparse_attn_aot"))
    rows = write_record() if arguments.write else list(compile_jobs(all_jobs(arguments.op or ops())))
    print(table(rows))
    print(f"{len(rows)} compilations, {sum(r.seconds for r in rows):.0f} s of processor time")
    bad = [f"{r.op}: {r.case} on {r.target}: {fault}" for r in rows for fault in r.faults]
    print("\n".join(bad) or "no faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
