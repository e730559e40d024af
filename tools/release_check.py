"""All that has to be true of a release, in one command (`make release-check`): see docs/releasing.md.

python tools/release_check.py [files] [wheel] [sdist] [torches] [docs] [notebooks]        default: all of them

files      each file of dist/: its name for old systems, its ABI, its size, its metadata; completeness of the sdist
wheel      an empty environment without a compiler: install, doctor, demo, bench, README's example, within LIMIT seconds
sdist      the same from the source distribution with a compiler; there it also runs tests of its own
torches    the smoke test of the wheel in the environments that TORCHES names ("env1/bin/python env2/bin/python")
docs       the site, every warning an error, and each page in a browser
notebooks  executed on small settings

TORCH_SPEC says which torch (tools/setup_env.sh), LIMIT how many seconds the wheel's walk may take (180).
SPARSE_ATTN_CUDA=0 leaves nvcc out of the build from source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
BIN = Path(sys.executable).parent
MOST = 20e6  # bytes of a file
SYSTEMS = ("manylinux_2_28_", "manylinux_2_27_")
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
SHAPE = ["--shape", "1,8/2,1024,1024,64", "--top-k", "64", "--seconds", "10"]
SAYS: list[str] = []  # of the step that runs, for the summary


class Failed(Exception):
    pass


def run(*command: object, cwd: Path | None = None, quiet: bool = True, **env: str) -> str:
    """What it prints; all of it where it fails."""
    start = time.perf_counter()
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd or ROOT,
        env={**os.environ, **path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    shown = " ".join(str(c).replace(f"{ROOT}/", "") for c in command)
    print(f"   {time.perf_counter() - start:5.1f} s  {shown[:140]}", flush=True)
    if done.returncode:
        raise Failed(f"{shown}\n{done.stdout[-6000:]}")
    if not quiet:
        print(done.stdout, flush=True)
    return done.stdout


def wheels() -> list[Path]:
    return sorted(DIST.glob("*.whl"))


def native_wheel() -> Path:
    found = [w for w in wheels() if f"-{PYTHON}-{PYTHON}-" in w.name]
    if not found:
        raise Failed(f"dist has no wheel for {PYTHON}: make wheels")
    return found[0]


def sdist() -> Path:
    (found,) = DIST.glob("*.tar.gz")
    return found


def files(scratch: Path) -> None:
    everything = [*wheels(), sdist()]
    native = [w for w in wheels() if "none-any" not in w.name]
    if len(native) == len(wheels()) or not native:
        raise Failed(f"dist must have wheels with kernels and one without, has {[w.name for w in wheels()]}")
    run("twine", "check", "--strict", *everything)
    run("check-wheel-contents", *wheels())
    for file in everything:
        if file.stat().st_size > MOST:
            raise Failed(f"{file.name} has {file.stat().st_size / 1e6:.1f} MB, more than {MOST / 1e6:.0f}")
    for wheel in native:
        tags = {tag.platform for tag in parse_wheel_filename(wheel.name)[3]}
        if not any(tag.startswith(SYSTEMS) for tag in tags):
            raise Failed(f"{wheel.name} is for {tags}, not for manylinux_2_28")
        shown = " ".join(run("auditwheel", "show", wheel).split())
        found = re.search(r'consistent with the following platform tag: "(manylinux_\d+_\d+)', shown)
        # As a wheel that takes libtorch_cpu from torch it is "linux" to auditwheel until told so: repair did.
        symbols = re.search(r"constrains the platform tag to \"(manylinux_\d+_\d+_\w+)\"", shown)
        SAYS.append(
            f"{wheel.name}: {(symbols or found or [0, 'no tag'])[1]}, {wheel.stat().st_size / 1e6:.1f} MB"
        )
        if not (symbols or found) or not (symbols or found)[1].startswith(("manylinux_2_2", "manylinux_2_1")):
            raise Failed(f"{wheel.name}: {shown}")
        inside = scratch / wheel.stem
        run(sys.executable, "-m", "zipfile", "-e", wheel, inside)
        audit = run("torch-abi-audit", "--check", "torch", inside / "sparse_attn")
        if "STABLE" not in audit:
            raise Failed(audit)
    pure = run(sys.executable, "-m", "zipfile", "-l", next(w for w in wheels() if "none-any" in w.name))
    if ".so" in pure:
        raise Failed("the pure-Python wheel has a shared object")
    if (ROOT / ".git").exists():
        run("check-sdist", "--source-dir", ROOT)


def environment(place: Path) -> Path:
    run("tools/setup_env.sh", "--torch", VENV=str(place))
    return place / "bin"


def walk(bin_: Path, scratch: Path, path: str) -> None:
    """What somebody does who has just installed it, in an empty folder."""
    here = scratch / "elsewhere"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    env = {"PATH": path, "MPLBACKEND": "Agg", "CXX": "", "CC": ""}
    run(bin_ / "python", "-m", "pip", "check", cwd=here, **env)
    run(bin_ / "sparse-attn", "doctor", cwd=here, **env)
    run(bin_ / "sparse-attn", "demo", "--steps", "20", "--lengths", "512", "--out", "demo", cwd=here, **env)
    run(bin_ / "sparse-attn", "bench", *SHAPE, cwd=here, **env)
    example = re.search(r"## Use\s+```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (here / "example.py").write_text(example[1])
    run(bin_ / "python", "example.py", cwd=here, **env)
    run(bin_ / "python", ROOT / "tools" / "smoke.py", cwd=here, **env)


def wheel(scratch: Path) -> None:
    start = time.perf_counter()
    bin_ = environment(scratch / "env")
    torch_took = time.perf_counter() - start
    # Of the system not even a shell is on the path: no compiler, nothing that stands in for one.
    path = str(bin_)
    run(bin_ / "python", "-m", "pip", "install", "--quiet", f"{native_wheel()}[cli]", PATH=path)
    walk(bin_, scratch, path)
    took = time.perf_counter() - start
    SAYS.append(
        f"{took:.0f} s from nothing to all commands, torch's installation ({torch_took:.0f} s) with it"
    )
    limit = float(os.environ.get("LIMIT", "180"))
    if took > limit:
        raise Failed(f"a new user's first steps took {took:.0f} s, more than {limit:.0f}")


def from_sdist(scratch: Path) -> None:
    bin_ = environment(scratch / "env")
    env = {"SPARSE_ATTN_REQUIRE_EXT": "1"}
    pip = [bin_ / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, "--force-reinstall", "--no-deps", sdist(), cwd=scratch, **env)
    run(*pip, "rich", "matplotlib", cwd=scratch)
    walk(bin_, scratch, f"{bin_}{os.pathsep}{os.environ['PATH']}")
    with tarfile.open(sdist()) as tar:
        tar.extractall(scratch / "unpacked")
    (tree,) = (scratch / "unpacked").iterdir()
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **env)
    env |= {"PYTHONPATH": str(tree)}
    counted = run(sys.executable, "-m", "pytest", "-q", "--collect-only", "tests", cwd=tree, **env)
    some = ["tests/test_build.py", "tests/test_public_api.py", "tests/ops/test_topk_select.py", "tests/cli"]
    ran = run(sys.executable, "-m", "pytest", "-q", *some, cwd=tree, **env)
    SAYS.append(f"{counted.strip().splitlines()[-1]}; of them run: {ran.strip().splitlines()[-1]}")


def torches(scratch: Path) -> None:
    for python in os.environ.get("TORCHES", "").split():
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
            native_wheel(),
            cwd=scratch,
        )
        SAYS.append(run(python, ROOT / "tools" / "smoke.py", cwd=scratch).strip().splitlines()[-1])
    if not SAYS:
        SAYS.append('no environment named: TORCHES="env/bin/python …"')


def docs(scratch: Path) -> None:
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", NO_MKDOCS_2_WARNING="1")
    SAYS.append(run(sys.executable, "tools/check_site.py").strip().splitlines()[-1])


def notebooks(scratch: Path) -> None:
    SAYS.append(run(sys.executable, "tools/run_notebooks.py").strip().splitlines()[-1])


STEPS: dict[str, Callable[[Path], None]] = {
    "files": files,
    "wheel": wheel,
    "sdist": from_sdist,
    "torches": torches,
    "docs": docs,
    "notebooks": notebooks,
}


def main() -> int:
    chosen = sys.argv[1:] or list(STEPS)
    if unknown := set(chosen) - set(STEPS):
        raise SystemExit(f"release_check: steps are {', '.join(STEPS)}, got {', '.join(unknown)}")
    summary, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(f"== {name}", flush=True)
            SAYS.clear()
            start = time.perf_counter()
            try:
                STEPS[name](Path(folder))
                verdict = "ok"
            except (Failed, ValueError) as error:
                print(error, flush=True)
                verdict, failed = "FAILED", True
            summary.append(f"{name:10} {verdict:7} {time.perf_counter() - start:5.0f} s")
            summary += [f"{'':10} {line}" for line in SAYS]
    print("\n".join(["", "release check", *summary]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
