"""Writes the build.ninja of `sparse_attn._C` and runs it. The tables (CPU, GPU targets) are in setup.py."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from toolchain import Nvcc, Torch, Unavailable, accepts, find_cxx, find_nvcc, find_torch

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
TARGET = "0x020a000000000000"  # torch 2.10: the oldest torch that the extension must load into

COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Kernels rely on NaN, infinities and signed zeros, so no -ffast-math; these two only free the vectorizer.
KERNEL = ["-fno-math-errno", "-fno-trapping-math"]
CUDA = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


@dataclass
class Plan:
    """All that decides what is compiled and how."""

    cxx: list[str]
    torch: Torch
    isas: dict[str, list[str]]  # name → flags, in rising order
    nvcc: Nvcc | None
    no_cuda: str  # why nvcc is None
    archs: list[str]  # "90a": code for that GPU; "120-virtual": PTX, compiled by newer GPUs when loaded
    build_dir: Path
    jobs: int


def make_plan(isas: dict[str, list[str]], archs: list[str]) -> Plan:
    if sys.platform not in ("linux", "darwin"):
        raise Unavailable(f"the native kernels are not built on {sys.platform} (Linux and macOS only)")
    cxx = find_cxx()
    if not cxx:
        raise Unavailable("no C++ compiler was found ($CXX, c++, g++, clang++); install one, then reinstall")
    torch = find_torch()
    if not torch:
        raise Unavailable("torch's C++ headers were not found; install torch>=2.10, then reinstall")
    if not torch.is_new_enough:
        raise Unavailable(f"torch {torch.version} is too old for the native kernels: they need torch>=2.10")
    if not accepts(cxx, []):
        raise Unavailable(f"{shlex.join(cxx)} does not compile C++20; use gcc>=11 or clang>=14")
    usable = {name: flags for name, flags in isas.items() if not flags or (X86 and accepts(cxx, flags))}
    wanted = os.environ.get("SPARSE_ATTN_CUDA", "1") != "0"
    nvcc = find_nvcc() if wanted else None
    no_cuda = "" if nvcc else "no nvcc was found" if wanted else "SPARSE_ATTN_CUDA=0 was set"
    build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = int(os.environ.get("MAX_JOBS") or cores)
    known = [a for a in archs if nvcc and nvcc.knows(a.removesuffix("-virtual"))]
    if nvcc and not known:
        raise Unavailable(f"nvcc {nvcc.version} knows none of the GPUs asked for: {', '.join(archs)}")
    return Plan(cxx, torch, usable, nvcc, no_cuda, known, build_dir, jobs)


def build(plan: Plan, target: Path) -> None:
    """Compiles what changed and puts the extension at `target`; Unavailable has the compiler's own words."""
    plan.build_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(plan.build_dir / ".lock"):
        _write_if_changed(plan.build_dir / "build_config.h", _config_header(plan))
        (plan.build_dir / "build.ninja").write_text(_ninja_file(plan))
        command = [_ninja(), "-C", str(plan.build_dir), "-j", str(plan.jobs)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise Unavailable("compiling the native kernels failed:\n" + run.stdout[-8000:])
        sys.stdout.write(run.stdout)
        # Objects of sources that are gone go too.
        subprocess.run([*command[:3], "-t", "cleandead"], stdout=subprocess.DEVNULL)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one step: a process that loads it meanwhile gets the old one or the new one, whole.
        fresh = target.with_suffix(".new")
        shutil.copy2(plan.build_dir / "_C.so", fresh)
        fresh.replace(target)


def _ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise Unavailable("ninja was not found; pip install ninja") from None
        return found


def _includes(plan: Plan) -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 was not found; pip install pybind11") from None

    # pip unpacks pybind11 at a new path for every build; a copy at a fixed one keeps rebuilds incremental.
    kept = plan.build_dir / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        shutil.copytree(pybind11.get_include(), kept)
    torch = plan.torch.root / "include"
    # pybind11 first: torch carries a copy too, which refuses to be used beside the stable ABI.
    folders = [kept, torch, torch / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    return [f"-I{plan.build_dir}", *(flag for folder in folders for flag in ("-isystem", str(folder)))]


def _config_header(plan: Plan) -> str:
    cuda = plan.nvcc.version if plan.nvcc else ""
    return (
        "// Written by the build: what bindings.cpp reports in build_info().\n#pragma once\n"
        f'#define SPARSE_ATTN_BUILD_ISAS "{",".join(plan.isas)}"\n'
        f'#define SPARSE_ATTN_BUILD_CUDA "{cuda}"\n'
        f'#define SPARSE_ATTN_BUILD_NO_CUDA "{plan.no_cuda}"\n'
        f'#define SPARSE_ATTN_BUILD_CUDA_ARCHS "{",".join(plan.archs)}"\n'
    )


def _ninja_file(plan: Plan) -> str:
    # File names in messages are relative to the checkout or to torch, not to the machine's root.
    common = [*COMMON, f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={plan.torch.root.parent}/="]
    host = [f"-DTORCH_TARGET_VERSION={TARGET}", *(f"-DSPARSE_ATTN_HAVE_{n.upper()}=1" for n in plan.isas)]
    host += ["-DSPARSE_ATTN_HAVE_X86=1"] if X86 else []
    host += ["-DSPARSE_ATTN_HAVE_CUDA=1"] if plan.nvcc else []
    # nvcc compiles several archs at once; the pool keeps files × archs within the job count.
    threads = max(1, min(plan.jobs, len(plan.archs)))
    lines = [
        "ninja_required_version = 1.5",
        f"pool nvcc\n  depth = {max(1, plan.jobs // threads)}",
        "rule cxx\n"
        f"  command = {_text([*plan.cxx, *common])} $flags -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
        f"host = {_text([*host, *_includes(plan)])}",
    ]
    objects = []

    def compile_(source: Path, out: str, rule: str, flags: str) -> None:
        objects.append(out)
        lines.append(f"build {_path(out)}: {rule} {_path(source)}\n  flags = {flags}")

    for source in _sources("csrc/*.cpp"):
        compile_(source, f"host/{source.stem}.o", "cxx", "$host")
    # The order matters. When two objects hold the same inline function (say, of the standard library), the
    # linker keeps the first: host and generic code come first, so that a CPU without AVX never runs a copy
    # compiled for AVX.
    for isa, isa_flags in plan.isas.items():
        flags = _text([*KERNEL, *isa_flags, f"-DSPARSE_ATTN_ISA={isa}"])
        for source in _sources("csrc/cpu/*.cpp"):
            compile_(source, f"{isa}/{source.stem}.o", "cxx", flags)
    if plan.nvcc:
        nvcc = [plan.nvcc.path, "-ccbin", plan.cxx[0], *CUDA, f"--threads={threads}"]
        lines.append(
            f"rule nvcc\n  command = {_text(nvcc)} $flags -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  pool = nvcc\n  description = CUDA $out"
        )
        for source in _sources("csrc/cuda/*.cu"):
            compile_(source, f"cuda/{source.stem}.cu.o", "nvcc", _text(_gencode(plan.archs)))
    link = f"{_text(plan.cxx)} $in -o $out {_text(_link_flags(plan))}"
    lines.append(f"rule link\n  command = {link}\n  description = link $out")
    lines.append("build _C.so: link " + " ".join(_path(o) for o in objects))
    return "\n".join(lines) + "\n"


def _gencode(archs: list[str]) -> list[str]:
    flags = ["-Xfatbin=-compress-all"]
    for arch in archs:
        number = arch.removesuffix("-virtual")
        kind = "compute" if arch.endswith("-virtual") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def _link_flags(plan: Plan) -> list[str]:
    # Only libtorch_cpu, where the stable C functions live: it is in every torch, CUDA or not, and is loaded
    # before _C (sparse_attn imports torch first), so the loader finds it by name and needs no rpath.
    # libstdc++ and libgcc stay shared: exceptions cross between torch and _C, and two copies break that.
    torch = [f"-L{plan.torch.root / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *torch]
    # The CUDA runtime goes in whole and its symbols stay hidden: torch's own may be of another version.
    cuda = [f"-L{plan.nvcc.library_dir}", "-lcudart_static"] if plan.nvcc else []
    return [
        "-shared",
        "-Wl,--as-needed",
        "-Wl,--exclude-libs,ALL",
        *torch,
        *cuda,
        "-lrt",
        "-ldl",
        "-lpthread",
    ]


def _sources(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


def _text(args: list[str]) -> str:
    return shlex.join(args).replace("$", "$$")


def _path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextlib.contextmanager
def _only_one(path: Path):
    """Two builds of one checkout at once (say, of a wheel and an editable install) take turns."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
