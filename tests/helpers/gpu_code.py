"""What the compiled GPU code takes: `python -m helpers.gpu_code` prints registers, stack and occupancy per kernel.

Read with cuobjdump, of the CUDA toolkit or the copy that Triton brings.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

REGISTERS, WARPS = 65536, {"80": 64, "90a": 64, "100a": 64}  # of a multiprocessor; 48 warps where not listed


@dataclass
class Usage:
    arch: str  # "90a"
    kernel: str  # demangled, without its parameters
    registers: int  # of a thread
    stack: int  # bytes of local memory: spills and arrays that are not in registers
    local: int

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor, as far as registers go."""
        return min(REGISTERS // (32 * -(-self.registers // 8) * 8), WARPS.get(self.arch, 48))


def library() -> Path:
    """The file with the kernels: beside the extension module, which is linked to it."""
    return next(Path(importlib.util.find_spec("sparse_attn._C").origin).parent.glob("libsparse_attn.*"))


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.origin:
        return None
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


def _short(mangled: str) -> str:
    """`attend_kernel<BFloat, 4>` of the mangled name; without c++filt the name of the function alone."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return mangled
    name = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(
        r"sparse_attn::(cuda::)?|\(anonymous namespace\)::|_GLOBAL__N_+\w+::|^void |\(int\)|\(bool\)",
        "",
        name,
    )
    return name.split("(")[0]


def usages(path: str | Path) -> list[Usage]:
    """One per kernel and GPU of an extension or object file."""
    text = subprocess.run(
        [find_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found, arch = [], ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = _short(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Usage(arch, kernel, *map(int, match.groups())))
    return found


def main() -> None:
    print(f"{'GPU':>5} {'registers':>9} {'stack':>6} {'local':>6} {'warps':>6}  kernel")
    for u in sorted(usages(library()), key=lambda u: (u.kernel, u.arch)):
        print(f"{u.arch:>5} {u.registers:>9} {u.stack:>6} {u.local:>6} {u.warps:>6}  {u.kernel}")


if __name__ == "__main__":
    main()
