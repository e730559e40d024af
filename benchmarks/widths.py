"""Measures the variable-width embedding and its loss: figures beside their targets, a JSON and a PNG.

    python -m benchmarks.widths             some five minutes, into benchmarks/results
    python -m benchmarks.widths --quick     few rounds, without memory, into benchmarks/scratch

SPARSE_ATTN_GPT2_BPE names a folder with GPT-2's encoder.json and vocab.bpe: then the ids are those of real text, with
ids by Zipf's law beside them. Ratios come from one run with the contenders in turn, as medians, after a check that each
computes the right thing.

A lookup writes 32 MiB, which glibc asks of the system anew for every call and the system clears first; an allocator
that keeps memory spares that. The forward is measured both ways ("memory kept" where it is).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import bench_variable_width_cross_entropy as loss
from benchmarks import bench_variable_width_embedding as lookup
from benchmarks import cross_entropy_cases, embedding_cases, machine
from benchmarks.correctness import WrongResult
from benchmarks.memory import ROOT
from benchmarks.run import RESULTS, SCRATCH

KEPT = "glibc.malloc.mmap_threshold=4294967295:glibc.malloc.trim_threshold=4294967295"


def run(rounds: int, quick: bool, threads: int, command: str) -> dict:
    """All measurements, as one JSON-able dict."""
    rows, left_out = [], []
    for kind in embedding_cases.KINDS:
        reason = embedding_cases.why_not(kind)
        if reason is not None:
            left_out.append(f"{kind} ids: {reason}")
            continue
        _say(f"lookup of {kind} ids")
        rows += lookup.measure(kind, 3 * rounds)
        if platform.libc_ver()[0] == "glibc":
            rows += _with_memory_kept(kind, 3 * rounds, threads)
        _say(f"loss of {kind} ids")
        rows += loss.measure(kind, rounds)
    peaks = []
    for name in () if quick else cross_entropy_cases.LABELS:
        if cross_entropy_cases.problem(name, "zipf") is None:
            _say(f"peak memory of {cross_entropy_cases.LABELS[name]}")
            peaks.append(loss.peak_memory(name, threads))
    for peak in peaks:
        peak["over_ours"] = peak["extra_mb"] / max(1e-3, peaks[0]["extra_mb"])
        dense = peak["contender"] == cross_entropy_cases.LABELS["dense"]
        peak["target"] = cross_entropy_cases.MEMORY_TARGET if dense else None
    return {
        "format": 1,
        "machine": machine.describe(threads, command),
        "lookup": embedding_cases.SETTING,
        "loss": cross_entropy_cases.SETTING,
        "rows": rows,
        "memory": peaks,
        "left_out": left_out,
    }


def _with_memory_kept(kind: str, rounds: int, threads: int) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.widths", "--lookup-of", kind, "--threads", str(threads)]
    environment = {**os.environ, "GLIBC_TUNABLES": KEPT}
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the lookup with memory kept failed: {done.stderr.strip().splitlines()[-1:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return [{**row, "direction": "forward, memory kept", "target": None} for row in rows]


def verdict(row: dict) -> str:
    """Whether a row reaches its target, in words; "" where it has none."""
    if row["target"] is None:
        return ""
    return f"at least {row['target']:.2f}: {'met' if row['over_ours'] >= row['target'] else 'falls short'}"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def print_results(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for op, setting in ((lookup.OP, results["lookup"]), (loss.OP, results["loss"])):
        table = Table("ids", "direction", "contender", title=f"{op}: {setting}", title_justify="left")
        for name in ("ms", "its time over ours"):
            table.add_column(name, justify="right")
        table.add_column("target")
        for row in (r for r in results["rows"] if r["op"] == op):
            times = f"{row['milliseconds']:,.2f}", f"{row['over_ours']:.2f}"
            table.add_row(row["ids"], row["direction"], row["contender"], *times, verdict(row))
        console.print(table)
    for row in results["memory"]:
        console.print(
            f"peak memory beyond the inputs, loss forward + backward, {row['contender']}: {row['extra_mb']:,.0f} MB "
            f"({row['over_ours']:.1f} × ours) {verdict(row)}",
            highlight=False,
        )
    for line in results["left_out"]:
        console.print(f"left out: {line}", highlight=False)


def draw(results: dict, path: Path) -> None:
    """Times over ours, a panel for the lookup and one for the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.plots import ratio_bars

    figure, axes = plt.subplots(1, 2, figsize=(19, 9), layout="constrained")
    figure.suptitle("sparse_attn: variable-width embedding and its exact loss", fontsize=15, weight="bold")
    figure.supxlabel(machine.in_words(results["machine"]), fontsize=9, color="#555555")
    for axis, op in zip(axes, (lookup.OP, loss.OP), strict=True):
        bars = [
            (f"{row['contender']}\n{row['direction']}, {row['ids']} ids", row["over_ours"], row["target"])
            for row in results["rows"]
            if row["op"] == op and not row["contender"].startswith("sparse_attn")
        ]
        ratio_bars(axis, bars, f"{op}: the alternative's time over ours (right of 1: ours is faster)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.widths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the two files")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    parser.add_argument("--peak-of", choices=tuple(cross_entropy_cases.LABELS), help=argparse.SUPPRESS)
    parser.add_argument("--lookup-of", choices=embedding_cases.KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    # What the run asks of processes of their own.
    if args.peak_of:
        print(json.dumps(loss.peak_here(args.peak_of)))
    elif args.lookup_of:
        print(json.dumps(lookup.measure(args.lookup_of, args.rounds, ("forward",))))
    else:
        return execute(args)
    return 0


def execute(args: argparse.Namespace) -> int:
    """What `python -m benchmarks.widths` and `sparse-attn bench --suite widths` do; returns the exit code."""
    torch.set_num_threads(args.threads)
    command = f"python -m benchmarks.widths{' --quick' if args.quick else ''} --threads {args.threads}"
    try:
        results = run(1 if args.quick else 5, args.quick, args.threads, command)
    except WrongResult as error:
        raise SystemExit(f"Nothing was reported, for a contender computes something else: {error}") from None
    folder = args.out or (SCRATCH if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "widths_cpu.json").write_text(text + "\n", "utf-8")
    draw(results, folder / "widths_cpu.png")
    print(text) if args.json else print_results(results)
    _say(f"wrote widths_cpu.json and widths_cpu.png to {folder.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
