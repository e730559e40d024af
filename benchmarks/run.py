"""Measures everything: prints the figures beside their targets, writes a JSON and a PNG.

    python -m benchmarks.run            the full run, a few minutes
    python -m benchmarks.run --quick    a smoke test, under two minutes

Ratios come from one run with the contenders in turn (A B A B …), as medians, after a check that each computes
the right thing. The full run includes the three pytest-benchmark suites (`pytest benchmarks`). With real inputs
(see `extract_real_inputs.py`) the comparisons with dense attention are repeated on those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import cases, inputs, machine, measure
from benchmarks.correctness import WrongResult
from sparse_attn.cli import bench

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCRATCH = HERE / "scratch"
SETTING = "B1 H8 D64 causal, K=64"
# Plain PyTorch takes this long for nothing: without the native kernels long sequences are left out.
PURE_MAX_LENGTH = 1024


def command_line(args: argparse.Namespace) -> str:
    """The command for the record, without the folders of this machine."""
    words = ["python -m benchmarks.run", *(["--quick"] if args.quick else [])]
    words += [f"--threads {args.threads}", *([f"--max-length {args.max_length}"] if args.max_length else [])]
    return " ".join(words + (["--no-suites"] if args.no_suites else []))


def run(args: argparse.Namespace, step) -> dict:
    """All measurements, as one JSON-able dict; `step` is told what comes next."""
    settings = measure.Settings.of(args.quick, args.threads, args.max_length)
    with torch.random.fork_rng(devices=[]):
        # The cheap ones that depend on other processes first: if they fail, little is lost.
        memory, overhead = measure.peak_memory(settings, args.quick, step), measure.overhead(args.quick, step)
        headline, left_out = measure.comparisons(cases.headline(args.quick), settings, step)
        real, no_real = measure.comparisons(cases.on_real_inputs(args.quick), settings, step)
        know, too_long = measure.comparisons(cases.know_before_use(), settings, step)
        scaling = measure.scaling(settings, step)
        suite_rows, failed = suites(settings, step) if with_suites(args) else ([], [])
    rows = headline + real + know
    return {
        "format": 1,
        "setting": SETTING,
        "quick": args.quick,
        "machine": machine.describe(args.threads, command_line(args)),
        "real_inputs": inputs.describe_real(),
        "headline": headline,
        "real": real,
        "know_before_use": know,
        "scaling": scaling,
        "overhead": overhead,
        "memory": memory,
        "suites": suite_rows,
        "left_out": [
            *dict.fromkeys(left_out + no_real + too_long),
            *failed,
            *(f"{row['name']}: {why}" for row in rows for why in row["left_out"].values()),
        ],
    }


# The attention ops; the embedding's benchmarks are commands of their own.
SUITES = ("gathered_attention", "topk_attention", "topk_select")


def with_suites(args: argparse.Namespace) -> bool:
    return not args.quick and not args.no_suites and find_spec("pytest_benchmark") is not None


def suites(settings: measure.Settings, step) -> tuple[list[dict], list[str]]:
    """Runs the pytest-benchmark suites in processes of their own: (medians, what failed)."""
    rows, failed = [], []
    for file in (HERE / f"bench_{op}.py" for op in SUITES):
        step(f"suite {file.stem}")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "pytest", "-q", file.relative_to(HERE.parent).as_posix()]
            command += [f"--benchmark-json={report}", "--threads", str(settings.threads), "--seconds", "0.3"]
            # What is longer, and plain PyTorch at T=4096, was measured in turns above.
            command += ["--max-length", str(min(settings.max_length, 4096)), "-k", "not plain or 1024"]
            done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
            if done.returncode != 0:
                last = (done.stdout + done.stderr).strip().splitlines()[-1:]
                failed.append(f"suite {file.stem} failed: {' '.join(last)}")
            if not report.exists():
                continue
            found = json.loads(report.read_text())["benchmarks"]
        rows += [
            {
                "suite": file.stem,
                "case": row["extra_info"]["case"],
                "contender": row["extra_info"]["contender"],
                "milliseconds": 1e3 * row["stats"]["median"],
                "rounds": row["stats"]["rounds"],
            }
            for row in found
        ]
    return rows, failed


def count_steps(args: argparse.Namespace) -> int:
    compared = (
        len(cases.headline(args.quick)) + len(cases.on_real_inputs(args.quick)) + len(cases.know_before_use())
    )
    lengths = {n for lengths in cases.SCALING.values() for n in lengths}
    return compared + len(lengths) + 1 + (1 if args.quick else 4) + (len(SUITES) if with_suites(args) else 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.configure(parser)
    return execute(parser.parse_args(argv))


def execute(args: argparse.Namespace) -> int:
    """What `python -m benchmarks.run` and `sparse-attn bench` do; returns the exit code."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from benchmarks import plots, report
    except ImportError as error:
        raise SystemExit(f"{error}: the benchmarks need rich, matplotlib and pytest-benchmark") from None
    torch.set_num_threads(args.threads)
    if os.environ.get(inputs.REAL_INPUTS):  # the suites run in another folder
        os.environ[inputs.REAL_INPUTS] = str(Path(os.environ[inputs.REAL_INPUTS]).resolve())
    if machine.wing() != "cpu" and args.max_length is None:
        args.max_length = PURE_MAX_LENGTH
    console, messages = Console(), Console(stderr=True)
    messages.print(f"{SETTING}; {args.threads} threads; torch {torch.__version__}; {machine.wing()} wing")
    if args.max_length is not None:
        messages.print(f"[yellow]sequences past T={args.max_length} are left out[/]")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    start = time.perf_counter()
    try:
        with Progress(*columns, console=messages, transient=True) as progress:
            task = progress.add_task("", total=count_steps(args), completed=-1)
            results = run(args, lambda what: progress.update(task, description=what, advance=1))
    except WrongResult as error:
        messages.print(f"[red]Nothing was reported, for a contender computes something else: {error}[/]")
        return 1
    except KeyboardInterrupt:
        messages.print("interrupted; nothing was written")
        return 130
    results["seconds"] = round(time.perf_counter() - start, 1)

    folder = args.out or (SCRATCH if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / f"{args.name}.json").write_text(text + "\n")
    plots.draw(results, folder / f"{args.name}.png")
    if args.json:
        print(text)
    else:
        report.print_results(results, console)
    messages.print(f"{results['seconds']:.0f} s; wrote {args.name}.json and {args.name}.png to {folder}")
    if folder == RESULTS:
        messages.print("`python -m benchmarks.readme --write` puts these figures into README.md and docs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
