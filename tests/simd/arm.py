"""The CPU kernels on 64-bit ARM, here: cross-compiled for each of its instruction sets and for none, and run under
emulation.

python tests/simd/arm.py            (`make arm`; Debian: g++-aarch64-linux-gnu, qemu-user)

tests/simd/kernels.cpp says what is proven: selection, by bounds too, decoding, attention with its gradients, key
indexes, the embedding and the loss. Each set runs on an emulated CPU that has nothing above it, so that an
instruction which it must not use ends the program. Then, that each of those CPUs is found to have its set, and that
the instructions which a set is there for are in it. Objects are kept in build/arm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "arm"
sys.path.insert(0, str(ROOT / "tools"))

import isas  # noqa: E402

COMPILER = "aarch64-linux-gnu-g++"
DISASSEMBLER = "aarch64-linux-gnu-objdump"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    f"-I{ROOT / 'csrc'}",
    f"-I{PLACE}",
]
SETS = {"plain": ["-DSPARSE_ATTN_PLAIN"], **isas.ARM}
KERNELS = (
    "topk_select",
    "topk_bounds",
    "topk_decode",
    "gathered_attention",
    "gathered_attention_backward",
    "index_keys",
    "variable_width_embedding",
    "variable_width_cross_entropy",
    "variable_width_cross_entropy_backward",
)
# A CPU that has the set and none above it.
CPUS = {"neon": "cortex-a53", "neon_dot": "neoverse-n1", "neon_bf16": "max"}
# What a set is there for, and what must not be in it.
INSTRUCTIONS = {
    "neon": (set(), {"sdot", "smmla", "bfdot"}),
    "neon_dot": ({"sdot"}, {"smmla", "bfdot"}),
    "neon_bf16": ({"sdot", "smmla", "bfdot", "bfcvtn"}, set()),
}


def compile_(source: Path, name: str, *flags: str) -> Path:
    """Anew, unless nothing that it is made of is younger."""
    to, used = PLACE / f"{name}.o", PLACE / f"{name}.d"
    if to.exists() and used.exists():
        sources = used.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if all(Path(s).exists() and Path(s).stat().st_mtime < to.stat().st_mtime for s in sources):
            return to
    subprocess.run([COMPILER, *FLAGS, *flags, "-MD", "-MF", used, "-c", source, "-o", to], check=True)
    return to


def compile_all() -> dict[str, Path]:
    here, csrc = Path(__file__).parent, ROOT / "csrc" / "cpu"
    jobs = [(here / f"{name}.cpp", name) for name in ("kernels", "products", "detect")]
    jobs.append((csrc / "isa.cpp", "isa"))
    jobs += [
        (csrc / "kernels" / f"{kernel}.cpp", f"{name}-{kernel}", f"-DSPARSE_ATTN_ISA={name}", *flags)
        for name, flags in SETS.items()
        for kernel in KERNELS
        if kernel in isas.PARTS.get(name, KERNELS)
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return {
            job[1]: made for job, made in zip(jobs, pool.map(lambda job: compile_(*job), jobs), strict=True)
        }


def link(name: str, objects: list[Path]) -> Path:
    program = PLACE / name
    subprocess.run([COMPILER, "-static", *objects, "-o", program], check=True)
    return program


def detects(program: Path) -> bool:
    """Each CPU its set, a cap obeyed, and a set that is none refused by name."""
    cases = [(cpu, "", name) for name, cpu in CPUS.items()]
    cases += [("cortex-a72", "", "neon"), ("max", "neon_dot", "neon_dot"), ("max", "neon", "neon")]
    cases += [("cortex-a53", "neon_bf16", "neon")]
    cases += [("max", "avx2", f"SPARSE_ATTN_CPU_ISA must be one of {', '.join(isas.ARM)}, got avx2")]
    right = True
    for cpu, cap, expected in cases:
        environment = {k: v for k, v in os.environ.items() if k != "SPARSE_ATTN_CPU_ISA"}
        environment |= {"SPARSE_ATTN_CPU_ISA": cap} if cap else {}
        command = [EMULATOR, "-cpu", cpu, program]
        found = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()
        if found != expected:
            print(f"detection: on {cpu}, kept to {cap or 'nothing'}: {found!r}, not {expected!r}")
            right = False
    print(f"detection: {len(cases)} cases, {'right' if right else 'wrong'}")
    return right


def has_its_instructions(name: str, objects: list[Path]) -> bool:
    text = subprocess.run([DISASSEMBLER, "-d", *objects], check=True, capture_output=True, text=True).stdout
    counts = {
        word: len(re.findall(rf"\t{word}\t", text)) for word in ("sdot", "smmla", "bfdot", "bfcvtn", "fmla")
    }
    print(f"instructions: {name}: {', '.join(f'{count} {word}' for word, count in counts.items() if count)}")
    needed, forbidden = INSTRUCTIONS[name]
    return all(counts[word] for word in needed) and not any(counts[word] for word in forbidden)


def main() -> int:
    if not shutil.which(COMPILER) or not EMULATOR:
        raise SystemExit(
            f"arm: {COMPILER} or qemu-aarch64 was not found (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    PLACE.mkdir(parents=True, exist_ok=True)
    header = (
        f"#define SPARSE_ATTN_EACH_ISA(X, ...) {' '.join(f'X({name}, __VA_ARGS__)' for name in isas.ARM)}\n"
    )
    if not (PLACE / "compiled_isas.h").exists() or (PLACE / "compiled_isas.h").read_text() != header:
        (PLACE / "compiled_isas.h").write_text(header)
    objects = compile_all()
    kernels = [made for name, made in objects.items() if name not in ("isa", "detect")]
    program = link("kernels", kernels)
    right = detects(link("detect", [objects["isa"], objects["detect"]]))
    for name, cpu in CPUS.items():
        own = [made for key, made in objects.items() if key.startswith(f"{name}-")]
        right &= has_its_instructions(name, own)
        right &= subprocess.run([EMULATOR, "-cpu", cpu, program, name]).returncode == 0
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
