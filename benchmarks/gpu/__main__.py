"""The benchmarks of a machine with a GPU: `python -m benchmarks.gpu [--out DIR] [--section NAME …] [--dry-run]`.

Each section runs in a process of its own with a time limit, so that one that fails takes no other with it. Every
contender is checked before it is timed. Writes one JSON and one PNG named after the device. A dry run needs no GPU:
Triton's interpreter, tiny shapes, every path but the timing, all sections in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.report import against_targets, draw, slug, table, tests_of

BENCHMARKS = Path(__file__).resolve().parents[1]
# section → seconds it may take, what tells most first; a build and all of them fit into ten minutes
SECTIONS = {
    "ceilings": 25,
    "topk_attention": 80,
    "topk_select": 60,
    "serving": 60,
    "gathered_attention": 70,
    "block_attention": 50,
    "cheap_selection": 40,
    "loss": 40,
    "embedding": 40,
    "memory": 25,
    "first_call": 50,
}
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "flash-attn",
    "pytest",
    "hypothesis",
    "matplotlib",
    "rich",
)


def run_section(name: str, dry: bool) -> Iterator[dict]:
    """The rows of one section, measured in this process."""
    import torch

    from benchmarks.gpu import attention, first_call, serving, tokens
    from benchmarks.gpu.timing import Device, ceilings

    torch.set_num_threads(1 if dry else 8)
    device = Device("cpu" if dry else "cuda", dry)
    if name == "ceilings":
        yield from ceilings(device)
        return
    modules = {"embedding": tokens, "loss": tokens, "first_call": first_call, "serving": serving}
    module = modules.get(name, attention)
    yield from getattr(module, name)(device)


def spawn(names: list[str], dry: bool, limit: float, rows: Path) -> tuple[list[dict], str | None, float]:
    """(rows, error or None, seconds) of these sections in a process of their own, which writes them to that file."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--rows", str(rows)]
        command += [part for name in names for part in ("--section", name)]
        # An empty cache, so that the first call's time is that of a first call.
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        if dry:
            command.append("--dry-run")
            environment["TRITON_INTERPRET"] = "1"
        error = None
        try:
            done = subprocess.run(
                command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True, timeout=limit
            )
            if done.returncode != 0:
                error = f"exit status {done.returncode}: {done.stderr.strip()[-1500:]}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return found, error, time.perf_counter() - start


def describe(dry: bool) -> dict:
    """The device and the software: enough to compare, nothing that names a person or a host."""
    import torch

    import sparse_attn
    from sparse_attn.wings import extension

    facts = {"device": "dry run" if dry else torch.cuda.get_device_name()}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda or torch.version.hip
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return {
        **facts,
        "sparse_attn": sparse_attn.__version__,
        "extension": extension.module.build_info() if extension.module else extension.load_error,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu.timing import ratios

    rows, errors, seconds = [], {}, {}
    deadline = time.perf_counter() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe(args.dry_run)
    path = args.out / f"{slug(machine['device'])}.json"
    sections = list(args.section or SECTIONS)
    for names in [sections] if args.dry_run else [[name] for name in sections]:
        name = ", ".join(names)
        left = deadline - time.perf_counter()
        if left < 5:
            errors[name] = f"left out: the {args.limit:.0f} s were over"
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        measured = args.out / f"{path.stem}_{names[0]}.jsonl"
        limit = left if args.dry_run else min(left, SECTIONS[name])  # the interpreter takes what it takes
        found, error, seconds[name] = spawn(names, args.dry_run, limit, measured)
        rows += found
        if error:
            errors[name] = error
        # Written after each section: whatever ends the run leaves what was measured.
        ratios(rows)
        results = {"format": 1, "machine": machine, "seconds": seconds, "errors": errors}
        results |= {"tests": tests_of(args.out), "targets": against_targets(rows), "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
        measured.unlink(missing_ok=True)
    try:
        draw(results, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(table(results))
    print(f"written to {path}")
    broken = [r for r in rows if r.get("error") and r["contender"].startswith("ours")]
    return 1 if errors or broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    default = Path(os.environ["OUT"]) if os.environ.get("OUT") else BENCHMARKS / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON and the PNG")
    parser.add_argument(
        "--section", action="append", choices=SECTIONS, help="only this one (may be repeated)"
    )
    parser.add_argument("--limit", type=float, default=540, help="seconds for all sections (default 540)")
    parser.add_argument(
        "--dry-run", action="store_true", help="no GPU: interpreted, tiny shapes, nothing timed"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # one section, in this process
    args = parser.parse_args()
    if args.rows is None:
        return run(args)
    with args.rows.open("w") as file:  # row by row: a section that is stopped keeps what it has
        for name in args.section:
            for row in run_section(name, args.dry_run):
                print(json.dumps(row), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
