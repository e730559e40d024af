"""The benchmarks of a machine with a GPU: `python -m benchmarks.gpu [--out DIR] [--section NAME …] [--dry-run]`.

Each section runs in a process of its own with a time limit, so that one that fails takes no other with it. Every
contender is checked before it is timed. Writes one JSON and one PNG named after the device. A dry run needs no GPU:
Triton's interpreter, tiny shapes, every path but the timing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
# section → seconds it may take; together under ten minutes
SECTIONS = {
    "ceilings": 60,
    "first_call": 90,
    "gathered_attention": 190,
    "topk_attention": 150,
    "topk_select": 90,
    "embedding": 90,
    "loss": 90,
    "memory": 60,
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

# (section, part of the case, direction, rival, least acceptable time of the rival over ours)
TARGETS = [
    ("topk_attention", "", "forward", "sdpa_flash", 0.5),
    ("gathered_attention", "/1 ", "forward", "sdpa_flash", 6.0),
    ("gathered_attention", "/1 ", "backward", "sdpa_flash", 3.0),
    ("topk_attention", "T16384 K256", "forward", "sdpa_flash", 1 / 1.5),
    ("topk_select", "", "forward", "plain_matmul_topk", 5.0),
    ("embedding", "bfloat16", "forward", "eager_adaptive_input", 5.0),
    ("loss", "bfloat16", "both", "linear_cross_entropy", 4.0),
    ("loss", "bfloat16", "both", "liger", 4.0),
]
# (part of the case, direction, least TFLOP/s) of gathered_attention
SPEEDS = [("H64/1 ", "forward", 300.0), ("H64/1 ", "backward", 80.0)]


def run_section(name: str, dry: bool) -> Iterator[dict]:
    """The rows of one section, measured in this process."""
    import torch

    from benchmarks import gpu_attention, gpu_first_call, gpu_tokens
    from benchmarks.gpu_timing import Device, ceilings

    torch.set_num_threads(1 if dry else 8)
    device = Device("cpu" if dry else "cuda", dry)
    if name == "ceilings":
        yield from ceilings(device)
        return
    modules = {"embedding": gpu_tokens, "loss": gpu_tokens, "first_call": gpu_first_call}
    module = modules.get(name, gpu_attention)
    yield from getattr(module, name)(device)


def spawn(name: str, dry: bool, limit: float) -> tuple[list[dict], str | None, float]:
    """(rows, error or None, seconds) of one section in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--rows", str(rows), "--section", name]
        # An empty cache, so that the first call's time is that of a first call.
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        if dry:
            command.append("--dry-run")
            environment["TRITON_INTERPRET"] = "1"
        error = None
        try:
            done = subprocess.run(
                command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=limit
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


def against_targets(rows: list[dict]) -> list[dict]:
    """Each target with what was measured, reached or not; None where its rival did not run."""
    found = []
    for section, part, direction, rival, least in TARGETS:
        for row in rows:
            same = (row["section"], row["contender"], row["direction"]) == (section, rival, direction)
            if same and part in row["case"] and "times_ours" in row:
                times = row["times_ours"]
                fact = {"target": least, "times_ours": times, "reached": times >= least}
                found.append(
                    {"section": section, "case": row["case"], "direction": direction, "rival": rival, **fact}
                )
    for part, direction, least in SPEEDS:
        for row in rows:
            if part in row["case"] and row["direction"] == direction and row.get("teraflops"):
                fact = {"target": least, "times_ours": row["teraflops"], "reached": row["teraflops"] >= least}
                rival = f"TFLOP/s of {row['contender']}"
                found.append(
                    {
                        "section": row["section"],
                        "case": row["case"],
                        "direction": direction,
                        "rival": rival,
                        **fact,
                    }
                )
    copy = next((r.get("gigabytes_per_s") for r in rows if r["contender"] == "copy"), None)
    for row in rows:
        if (
            copy
            and row["section"] == "embedding"
            and row["contender"] == "ours"
            and row.get("gigabytes_per_s")
        ):
            share = row["gigabytes_per_s"] / copy
            fact = {"target": 0.7, "times_ours": share, "reached": share >= 0.7}
            rival = "copy bandwidth (share of)"
            found.append(
                {"section": "embedding", "case": row["case"], "direction": "forward", "rival": rival, **fact}
            )
    return found


def tests_of(folder: Path) -> dict:
    """What `gpu_check.sh test` left beside: the sums, and the names of what failed or was left out."""
    found = {}
    for path in sorted(folder.glob("tests_*.json")):
        report = json.loads(path.read_text())
        bad = [{n: v for n, v in f.items() if n != "output"} for f in report["files"]]
        bad = [f for f in bad if f.get("failures") or f.keys() & {"left_out", "stopped", "error"}]
        found[path.stem] = {"total": report["total"], "bad": bad}
    return found


def slug(name: str) -> str:
    return "gpu_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def table(results: dict) -> str:
    lines = [
        f"{'section':<19}{'case':<44}{'contender':<22}{'direction':<10}{'ms':>10}{'× ours':>9}{'peak MB':>9}"
    ]
    for r in results["rows"]:
        if r.get("error"):
            tail = f"  {r['error'][:60]}"
        else:
            ms, times, peak = r.get("ms"), r.get("times_ours"), r.get("peak_bytes")
            other = f"{r['gigabytes_per_s']:.0f} GB/s" if r.get("gigabytes_per_s") else ""
            other = f"{r['teraflops']:.0f} TFLOP/s" if r.get("teraflops") else other
            tail = f"{ms:>10.3f}" if ms is not None else f"{'–':>10}"
            tail += f"{times:>9.2f}" if times else " " * 9
            tail += f"{peak / 1e6:>9.0f}" if peak is not None else " " * 9
            tail += f"  {other}"
        lines.append(f"{r['section']:<19}{r['case']:<44}{r['contender']:<22}{r['direction']:<10}{tail}")
    lines += [f"{name}: {error}" for name, error in results["errors"].items()]
    for t in results["targets"]:
        verdict = "reached" if t["reached"] else "NOT reached"
        lines.append(
            f"target {t['section']} {t['case']} {t['direction']} vs {t['rival']}: "
            f"{t['times_ours']:.2f}, wanted {t['target']:g}: {verdict}"
        )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """One bar per rival, case and direction: how many times as long as ours it takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [r for r in results["rows"] if r.get("times_ours")]
    figure, axis = plt.subplots(figsize=(13, max(3, 0.26 * len(bars) + 1.5)), layout="constrained")
    machine = results["machine"]
    axis.set_title(
        f"Time of the alternative over sparse_attn's (right of 1: sparse_attn is faster)\n{machine['device']}, "
        f"torch {machine['torch']}, triton {machine['triton']}, {machine['date']}",
        fontsize=10,
        loc="left",
    )
    if bars:
        values = [r["times_ours"] for r in bars]
        colours = ["#1f6f8b" if v >= 1 else "#c8553d" for v in values]
        axis.barh(range(len(bars)), [v - 1 for v in values], left=1, color=colours)
        labels = [f"{r['section']} {r['case']} {r['direction']}: {r['contender']}" for r in bars]
        axis.set_yticks(range(len(bars)), labels, fontsize=7)
        axis.set_xscale("log")
        axis.axvline(1, color="#222222", linewidth=1)
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:.2g}×", (value, place), xytext=(4, 0), textcoords="offset points", fontsize=7
            )
        axis.invert_yaxis()
    else:
        axis.text(0.5, 0.5, "nothing was timed", ha="center", transform=axis.transAxes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu_timing import ratios

    rows, errors, seconds = [], {}, {}
    deadline = time.perf_counter() + args.limit
    for name in args.section or SECTIONS:
        left = deadline - time.perf_counter()
        if left < 5:
            errors[name] = f"left out: the {args.limit:.0f} s were over"
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        found, error, seconds[name] = spawn(name, args.dry_run, min(left, SECTIONS[name]))
        rows += found
        if error:
            errors[name] = error
    ratios(rows)
    results = {"format": 1, "machine": describe(args.dry_run), "seconds": seconds, "errors": errors}
    results |= {"tests": tests_of(args.out), "targets": against_targets(rows), "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug(results['machine']['device'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
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
    default = Path(os.environ["OUT"]) if os.environ.get("OUT") else HERE / "results"
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
        for row in run_section(args.section[0], args.dry_run):
            print(json.dumps(row), file=file, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
