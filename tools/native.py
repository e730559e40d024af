"""Writes the build.ninja of the extension and runs it. What for: tools/isas.py (CPUs) and setup.py (GPUs).

Two shared objects, side by side: `libsparse_attn` has the kernels and registers the ops with torch, and loads into a
program without Python; `sparse_attn._C` is the Python module, linked to it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from toolchain import Nvcc, Torch, Unavailable, accepts, env_flag, find_cxx, find_nvcc, find_torch

ROOT = Path(__file__).resolve().parent.parent
TARGET = "0x020a000000000000"  # torch 2.10: the oldest torch that the extension must load into
LIBRARY = "libsparse_attn.dylib" if sys.platform == "darwin" else "libsparse_attn.so"

# What stands in for newer system libraries (csrc/common/old_libraries.cpp says what, and why).
OLD_LIBRARIES, OLD_THREADS = "old_libraries", "old_threads"
OLD_NAMES = ("libpthread.so.0", "libdl.so.2", "librt.so.1")
# Of a shared object for Linux: all but what is named stays inside.
EXPORTS = {
    LIBRARY: '{ global: extern "C++" { sparse_attn::*; }; local: *; };\n',
    "_C.so": "{ global: PyInit__C; local: *; };\n",
}
GLIBC = platform.libc_ver()[0] == "glibc" and platform.machine() in ("x86_64", "aarch64")

NO_GPU = "no NVIDIA GPU answers on this machine (SPARSE_ATTN_CUDA_ARCHS=all compiles for every GPU)"

COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Kernels rely on NaN, infinities and signed zeros, so no -ffast-math; these two only free the vectorizer.
KERNEL = ["-fno-math-errno", "-fno-trapping-math"]
CUDA = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# What SPARSE_ATTN_SANITIZE adds to every compilation and to the link. A finding of UBSan ends the process.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


@dataclass
class Plan:
    """All that decides what is compiled and how."""

    cxx: list[str]
    torch: Torch
    isas: dict[str, list[str]]  # name → flags, in rising order
    parts: dict[str, tuple[str, ...]]  # name → the only kernels that it has; absent: all
    nvcc: Nvcc | None
    no_cuda: str  # why nvcc is None
    archs: list[str]  # "90a": code for that GPU; "120-virtual": PTX, compiled by newer GPUs when loaded
    build_dir: Path
    jobs: int
    sanitize: list[str]  # flags of a sanitizer, or none


def make_plan(isas: dict[str, list[str]], parts: dict[str, tuple[str, ...]], archs: list[str]) -> Plan:
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
    sanitizer = os.environ.get("SPARSE_ATTN_SANITIZE", "")
    if sanitizer and sanitizer not in SANITIZERS:
        raise Unavailable(f"SPARSE_ATTN_SANITIZE must be one of {', '.join(SANITIZERS)}, got {sanitizer}")
    usable = {name: flags for name, flags in isas.items() if not flags or accepts(cxx, flags)}
    wanted = os.environ.get("SPARSE_ATTN_CUDA", "1") != "0" and not sanitizer
    nvcc = find_nvcc() if wanted and archs else None
    no_cuda = "" if nvcc else "no nvcc was found" if archs else NO_GPU
    no_cuda = (
        no_cuda if wanted else "SPARSE_ATTN_SANITIZE was set" if sanitizer else "SPARSE_ATTN_CUDA=0 was set"
    )
    # One folder for every Python: of all objects only the module's is of one.
    name = "-".join(filter(None, ("native", sanitizer, platform.machine())))
    build_dir = ROOT / "build" / name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = int(os.environ.get("MAX_JOBS") or cores)
    known = [a for a in archs if nvcc and nvcc.knows(a.removesuffix("-virtual"))]
    if nvcc and not known:
        no_cuda = f"nvcc {nvcc.version} knows none of the GPUs asked for: {', '.join(archs)}"
        nvcc = None
        if env_flag("SPARSE_ATTN_REQUIRE_EXT"):
            raise Unavailable(no_cuda)
    # Enough of -O to end, little enough that a report's lines are those of the source.
    flags = [*SANITIZERS[sanitizer], "-O1", "-g1", "-fno-omit-frame-pointer"] if sanitizer else []
    # macOS' linker refuses a weak symbol that nobody defines: there each set has all kernels.
    parts = {} if sys.platform == "darwin" else parts
    return Plan(cxx, torch, usable, parts, nvcc, no_cuda, known, build_dir, jobs, flags)


def build(plan: Plan, target: Path) -> None:
    """Compiles what changed; the module goes to `target`, the library beside it.

    Unavailable has the compiler's own words.
    """
    plan.build_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(plan.build_dir / ".lock"):
        _write_if_changed(plan.build_dir / "build_config.h", _config_header(plan))
        _write_if_changed(plan.build_dir / "compiled_isas.h", _isas_header(plan))
        for name, names in EXPORTS.items():
            _write_if_changed(plan.build_dir / f"{name}.map", names)
        (plan.build_dir / "build.ninja").write_text(_ninja_file(plan))
        command = [_ninja(), "-C", str(plan.build_dir), "-j", str(plan.jobs)]
        status, output = _run_and_report(command)
        if status:
            raise Unavailable("compiling the native kernels failed:\n" + output[-8000:])
        sys.stdout.write(output)
        # Objects of sources that are gone go too.
        subprocess.run([*command[:3], "-t", "cleandead"], stdout=subprocess.DEVNULL)
        replace(plan.build_dir / LIBRARY, target.with_name(LIBRARY))
        replace(plan.build_dir / f"{_module()}.so", target)


def replace(source: Path, target: Path) -> None:
    """Copies in one step: a process that loads it meanwhile gets the old file or the new one, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(source, fresh)
    fresh.replace(target)


def _run_and_report(command: list[str]) -> tuple[int, str]:
    """Exit status and output. Ninja's "[3/60] …" also go to the file that SPARSE_ATTN_PROGRESS names, as they come:
    pip shows nothing of a build before it has failed."""
    lines = []
    with (
        open(os.environ.get("SPARSE_ATTN_PROGRESS", os.devnull), "a") as progress,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in process.stdout:
            lines.append(line)
            if line.startswith("["):
                progress.write(line)
                progress.flush()
    return process.returncode, "".join(lines)


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
    folders = [kept.name, torch, torch / "torch/csrc/api/include"]
    return ["-I.", *(flag for folder in folders for flag in ("-isystem", str(folder)))]


def _isas_header(plan: Plan) -> str:
    calls = " ".join(f"X({name}, __VA_ARGS__)" for name in plan.isas)
    return (
        "// Written by the build: the instruction sets that the CPU kernels are compiled for, in rising order.\n"
        f"#pragma once\n#define SPARSE_ATTN_EACH_ISA(X, ...) {calls}\n"
    )


def _config_header(plan: Plan) -> str:
    cuda = plan.nvcc.version if plan.nvcc else ""
    return (
        "// Written by the build: what module.cpp reports in build_info().\n#pragma once\n"
        f'#define SPARSE_ATTN_BUILD_ISAS "{",".join(plan.isas)}"\n'
        f'#define SPARSE_ATTN_BUILD_CUDA "{cuda}"\n'
        f'#define SPARSE_ATTN_BUILD_NO_CUDA "{plan.no_cuda}"\n'
        f'#define SPARSE_ATTN_BUILD_CUDA_ARCHS "{",".join(plan.archs)}"\n'
    )


def _ninja_file(plan: Plan) -> str:
    # Paths are seen from the build folder, so that it can be moved along with its checkout: what is compiled stays so.
    # File names in messages are relative to the checkout or to torch, not to the machine's root.
    root = os.path.relpath(ROOT, plan.build_dir)
    sources = f"-I{root}/csrc"
    common = [
        *COMMON,
        *plan.sanitize,
        sources,
        f"-ffile-prefix-map={root}/=",
        f"-ffile-prefix-map={plan.torch.root.parent}/=",
    ]
    # nvcc compiles several archs at once; the pool keeps files × archs within the job count.
    threads = max(1, min(plan.jobs, len(plan.archs)))
    lines = [
        "ninja_required_version = 1.5",
        f"pool nvcc\n  depth = {max(1, plan.jobs // threads)}",
        "rule cxx\n"
        f"  command = {_text([*plan.cxx, *common])} $flags -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
        f"host = {_text([f'-DTORCH_TARGET_VERSION={TARGET}', *_includes(plan)])}",
    ]
    objects = []  # of the library
    for name in (OLD_LIBRARIES, OLD_THREADS):
        source = _path(f"{root}/csrc/common/{name}.cpp")
        lines.append(f"build host/{name}.o: cxx {source}\n  flags =")

    def compile_(source: Path, out: str, rule: str, flags: str) -> None:
        objects.append(out)
        lines.append(f"build {_path(out)}: {rule} {_path(f'{root}/{source}')}\n  flags = {flags}")

    for device in ("cpu", "cuda") if plan.nvcc else ("cpu",):
        for source in _sources(f"csrc/{device}/*.cpp"):
            compile_(source, f"host/{device}/{source.stem}.o", "cxx", "$host")
    # The order matters. When two objects hold the same inline function (say, of the standard library), the
    # linker keeps the first: host and generic code come first, so that a CPU without AVX never runs a copy
    # compiled for AVX.
    for isa, isa_flags in plan.isas.items():
        flags = _text([*KERNEL, *isa_flags, f"-DSPARSE_ATTN_ISA={isa}"])
        for source in _sources("csrc/cpu/kernels/*.cpp"):
            if source.stem in plan.parts.get(isa, (source.stem,)):
                compile_(source, f"{isa}/{source.stem}.o", "cxx", flags)
    if plan.nvcc:
        nvcc = [plan.nvcc.path, "-ccbin", plan.cxx[0], *CUDA, sources, f"--threads={threads}"]
        lines.append(
            f"rule nvcc\n  command = {_text(nvcc)} $flags -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  pool = nvcc\n  description = CUDA $out"
        )
        for source in _sources("csrc/cuda/kernels/*.cu"):
            compile_(source, f"cuda/{source.stem}.cu.o", "nvcc", _text(_gencode(plan.archs)))
    link = _text([*plan.cxx, *plan.sanitize])
    lines.append(f"rule link\n  command = {link} $in -o $out $flags\n  description = link $out")
    inputs = " ".join(_path(o) for o in [*objects, *(f"host/{name}.o" for name in _old(plan))])
    lines.append(f"build {LIBRARY}: link {inputs} | {LIBRARY}.map\n  flags = {_text(_library_flags(plan))}")
    module = _path(f"{root}/csrc/module.cpp")
    python = _text(["-isystem", sysconfig.get_paths()["include"]])
    lines.append(f"build {_module()}.o: cxx {module}\n  flags = $host {python}")
    inputs = f"{_module()}.o host/{OLD_LIBRARIES}.o | {LIBRARY} _C.so.map"
    lines.append(f"build {_module()}.so: link {inputs}\n  flags = {_text(_module_flags(plan))}")
    return "\n".join(lines) + "\n"


def _gencode(archs: list[str]) -> list[str]:
    flags = ["-Xfatbin=-compress-all"]
    for arch in archs:
        number = arch.removesuffix("-virtual")
        kind = "compute" if arch.endswith("-virtual") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def _library_flags(plan: Plan) -> list[str]:
    # Only libtorch_cpu, where the stable C functions live: it is in every torch, CUDA or not, and is loaded
    # before (sparse_attn imports torch first), so the loader finds it by name and needs no rpath.
    # libstdc++ and libgcc stay shared: exceptions cross between torch and here, and two copies break that.
    torch = [f"-L{plan.torch.root / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        return ["-dynamiclib", f"-Wl,-install_name,@rpath/{LIBRARY}", *torch]
    # The CUDA runtime goes in whole and its symbols stay hidden: torch's own may be of another version.
    cuda = [f"-L{plan.nvcc.library_dir}", "-lcudart_static"] if plan.nvcc else []
    return [
        "-shared",
        f"-Wl,-soname,{LIBRARY}",
        "-Wl,-z,defs",  # a kernel table that no kernel file fills is an error here, not when it is loaded
        "-Wl,--as-needed",
        "-Wl,--exclude-libs,ALL",
        f"-Wl,--version-script={LIBRARY}.map",
        *torch,
        *cuda,
        "-lrt",
        "-ldl",
        "-lpthread",
        # Where libc is older than 2.34 it is these that have what old_threads asks for.
        *(["-Wl,--no-as-needed", *(f"-l:{name}" for name in OLD_NAMES)] if plan.nvcc and GLIBC else []),
        *_wrapped(_old(plan)),
    ]


def _old(plan: Plan) -> list[str]:
    """Only what is called: what is linked in is asked for when the library loads."""
    return [OLD_LIBRARIES, OLD_THREADS] if plan.nvcc else [OLD_LIBRARIES]


def _wrapped(files: list[str]) -> list[str]:
    if not GLIBC:
        return []
    listed = [(ROOT / f"csrc/common/{name}.cpp").read_text() for name in files]
    names = re.findall(r"^SPARSE_ATTN_OLD(?:_VERSION)?\((\w+)", "".join(listed), re.MULTILINE)
    return [f"-Wl,--wrap={name}" for name in dict.fromkeys(names)]


def _module_flags(plan: Plan) -> list[str]:
    library = ["-L.", "-lsparse_attn"]
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *library, "-Wl,-rpath,@loader_path"]
    return [
        "-shared",
        *library,
        "-Wl,-rpath,$ORIGIN",
        "-Wl,--version-script=_C.so.map",
        *_wrapped([OLD_LIBRARIES]),
    ]


def _module() -> str:
    return f"_C-{sys.implementation.cache_tag}"


def _sources(pattern: str) -> list[Path]:
    """Relative to the checkout."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


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
