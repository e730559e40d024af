"""Runs the test suite file by file, several at once, within a time limit: `python -m benchmarks.gpu.tests [--limit S]`.

Most of a first run on a GPU is Triton compiling, on the host and one kernel at a time per process: several processes
share that out. A file that needs a package that is not here is left out, by name. Prints one line per file, the ends
of the failures, and a sum; writes the same as JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("hypothesis", "expecttest", "rich", "matplotlib", "pytest_benchmark", "triton")


# Where a kernel's first minutes on a device would fail, most likely first.
RISKS = (
    "gathered_attention", "topk_select", "topk_attention", "block_attention", "tail", "residual", "key_index", "varlen",
    "paged", "indexer_select", "quantized_select", "refine_blocks", "variable_width", "softcap_and_sinks",
)  # fmt: skip


def risk(path: Path) -> int:
    found = [
        i
        for i, name in enumerate(RISKS)
        if path.parent.name == "ops" and path.stem.startswith(f"test_{name}")
    ]
    return found[0] if found else len(RISKS)


def missing_for(path: Path) -> list[str]:
    """The packages that a test file imports and that are not here."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    return [name for name in OPTIONAL if name in imported and find_spec(name) is None]


def run_file(path: Path, select: str | None, deadline: float) -> dict:
    """One file in a pytest of its own; stopped with what it has at the deadline."""
    name = str(path.relative_to(ROOT / "tests"))
    absent = missing_for(path)
    if absent:
        return {"file": name, "left_out": f"{', '.join(absent)} not installed"}
    left = deadline - time.monotonic()
    if left < 5:
        return {"file": name, "left_out": "the time was over"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-rfE",
        str(path),
    ]
    command += ["-k", select] if select else []
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    stopped = False
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(2)  # as Ctrl-C: pytest prints what it has
        try:
            output, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output[-400:])
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    fact = {"file": name, "seconds": round(time.monotonic() - start, 1), **counts, "failures": failed}
    if stopped:
        fact["stopped"] = True
    elif process.returncode not in (0, 1, 5):  # 5: nothing selected
        fact["error"] = f"exit status {process.returncode}"
    if failed or "error" in fact or stopped:
        fact["output"] = output[-6000:]
    return fact


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tests", description=__doc__)
    parser.add_argument("--limit", type=float, default=540, help="seconds for all files (default 540)")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("-k", dest="select", help="pytest's -k, such as cuda")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("files", nargs="*", type=Path, help="test files (default: all)")
    args = parser.parse_args()
    if find_spec("pytest") is None:
        print("pytest is not installed: no test was run")
        return 1
    files = [f.resolve() for f in args.files] or sorted((ROOT / "tests").rglob("test_*.py"))
    # What interprets is run by a test. The kernels go first, those of attention before the others; then what is
    # largest, so that nothing long is left for the end.
    files = [f for f in files if args.files or f.parent.name != "interpreted"]
    files.sort(key=lambda f: (risk(f), -f.stat().st_size))
    deadline = time.monotonic() + args.limit
    with ThreadPoolExecutor(args.jobs) as pool:
        facts = list(pool.map(lambda f: run_file(f, args.select, deadline), files))
    for fact in facts:
        print("  ".join(f"{n}={v}" for n, v in fact.items() if n not in ("output", "failures") and v != []))
    for fact in facts:
        if "output" in fact:
            print(f"\n===== {fact['file']}\n{fact['output'][-2500:]}")
    total = {n: sum(f.get(n, 0) for f in facts) for n in ("passed", "failed", "skipped", "errors")}
    incomplete = [f["file"] for f in facts if "left_out" in f or "stopped" in f or "error" in f]
    print(f"\ntests: {total}, incomplete files: {incomplete or 'none'}")
    if args.out:
        args.out.write_text(
            json.dumps({"select": args.select, "total": total, "files": facts}, indent=1) + "\n"
        )
    bad = any(f.get("failures") or f.get("error") or f.get("stopped") or f.get("failed") for f in facts)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
