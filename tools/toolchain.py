"""What the build finds on this machine: torch's headers, a C++ compiler, nvcc. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)  # the stable ABI that the extension is built on starts here


class Unavailable(Exception):
    """The extension cannot be built; the text says why and what would help."""


def env_flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


_WHERE_IS_TORCH = """
import importlib.util
spec = importlib.util.find_spec("torch")
print(spec.submodule_search_locations[0] if spec else "")
"""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str

    @property
    def is_new_enough(self) -> bool:
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:2]) >= MIN_TORCH


def find_torch() -> Torch | None:
    """The torch that the extension is for, found without importing it.

    pip builds in an overlay that hides the environment's own packages from this process. A fresh interpreter
    without the PYTHON* variables (-E) does not see the overlay: it answers for the environment that the
    package goes into. SPARSE_ATTN_TORCH names another: its headers and libtorch_cpu serve every Python.
    """
    named = os.environ.get("SPARSE_ATTN_TORCH", "")
    spec = importlib.util.find_spec("torch")
    if named:
        here = named
    elif spec and spec.submodule_search_locations:
        here = spec.submodule_search_locations[0]
    else:
        answer = subprocess.run([sys.executable, "-E", "-c", _WHERE_IS_TORCH], capture_output=True, text=True)
        here = answer.stdout.strip()
    if not here or not (Path(here) / "include/torch/csrc").is_dir():
        return None
    found = re.search(r"""__version__ = ['"]([^'"]+)""", (Path(here) / "version.py").read_text())
    return Torch(Path(here), found.group(1)) if found else None


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command: $CXX, else the first usual name on PATH."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    names = ("c++", "g++", "clang++")
    return next(([name] for name in names if shutil.which(name)), None)


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler takes these flags (for a C++20 file, as every file here is)."""
    command = [*cxx, "-std=c++20", *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: str
    library_dir: Path  # holds libcudart_static.a
    code: frozenset[str]  # the sm_ numbers that it can generate: {"80", "90", …}

    def knows(self, arch: str) -> bool:
        return arch.rstrip("af") in self.code


def find_gpus() -> list[str]:
    """The compute capabilities of the NVIDIA GPUs that answer: ["90"]."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = (
        re.findall(r"^(\d+)\.(\d)\s*$", answer.stdout, flags=re.MULTILINE) if not answer.returncode else []
    )
    return sorted({major + minor for major, minor in found}, key=int)


def find_nvcc() -> Nvcc | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    path = path or shutil.which("nvcc")
    if not path:
        return None

    def ask(*args: str) -> str:
        answer = subprocess.run([path, *args], capture_output=True, text=True)
        return answer.stdout + answer.stderr

    version = re.search(r"release ([\d.]+)", ask("--version"))
    # nvcc may be a wrapper script far from its toolkit; the dry run prints where it would link from.
    folders = [Path(p) for p in re.findall(r'"-L([^"]+)"', ask("--dryrun", "-c", "none.cu"))]
    library_dir = next((p for p in folders if (p / "libcudart_static.a").exists()), None)
    if not version or not library_dir:
        return None
    code = frozenset(re.findall(r"sm_(\d+)", ask("--list-gpu-code")))
    return Nvcc(path, version.group(1), library_dir.resolve(), code)
