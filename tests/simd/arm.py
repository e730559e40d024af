"""The CPU kernels on 64-bit ARM, here: cross-compiled with NEON and without, and run under emulation.

python tests/simd/arm.py            (`make arm`; Debian: g++-aarch64-linux-gnu, qemu-user)

tests/simd/kernels.cpp says what is proven: selection, by bounds too, attention with its gradients, key indexes and
the embedding. Objects are kept in build/arm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    f"-I{ROOT / 'csrc'}",
]
SETS = {"simd": [], "plain": ["-DSPARSE_ATTN_PLAIN"]}
KERNELS = (
    "topk_select",
    "topk_bounds",
    "gathered_attention",
    "gathered_attention_backward",
    "index_keys",
    "variable_width_embedding",
)


def compile_(source: Path, name: str, *flags: str) -> Path:
    """Anew, unless nothing that it is made of is younger."""
    to, used = PLACE / f"{name}.o", PLACE / f"{name}.d"
    if to.exists() and used.exists():
        sources = used.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if all(Path(s).exists() and Path(s).stat().st_mtime < to.stat().st_mtime for s in sources):
            return to
    subprocess.run([COMPILER, *FLAGS, *flags, "-MD", "-MF", used, "-c", source, "-o", to], check=True)
    return to


def main() -> int:
    if not shutil.which(COMPILER) or not EMULATOR:
        raise SystemExit(
            f"arm: {COMPILER} or qemu-aarch64 was not found (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    PLACE.mkdir(parents=True, exist_ok=True)
    jobs = [(Path(__file__).with_name("kernels.cpp"), "kernels")]
    jobs += [
        (
            ROOT / "csrc" / "cpu" / "kernels" / f"{kernel}.cpp",
            f"{name}-{kernel}",
            f"-DSPARSE_ATTN_ISA={name}",
            *flags,
        )
        for name, flags in SETS.items()
        for kernel in KERNELS
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: compile_(*job), jobs))
    program = PLACE / "kernels"
    subprocess.run([COMPILER, "-static", *objects, "-o", program], check=True)
    return subprocess.run([EMULATOR, program]).returncode


if __name__ == "__main__":
    sys.exit(main())
