"""`sparse-attn demo`: a small GPT learns real text with top-k attention beside dense attention."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

from sparse_attn.cli.console import UsageError, available_devices, count, device_of, refusals, require
from sparse_attn.demo import session, tables, text, timing
from sparse_attn.demo.plots import draw
from sparse_attn.demo.report import Report, as_json
from sparse_attn.demo.train import Settings, arms_of
from sparse_attn.files import write_text
from sparse_attn.wings import base

HELP = "train a small GPT on real text, dense and top-k side by side, and time attention at long lengths"

DESCRIPTION = """\
Trains a small causal GPT (characters as tokens) on a text twice, once with dense attention and once with each query
attending to its --top-k best keys alone: same seed, same data order. (--embedding variable adds a third model, see
below.) Then times one attention at several lengths. It measures a training step first, takes as many as --seconds
allow, and says how long that will be: about two minutes by default. Ctrl-C ends it early and keeps what it has.

What you get: a table (validation loss, speed, peak memory; attention times for scaled_dot_product_attention,
sparse_attn and the same written in plain PyTorch), a text sample of the top-k model, and in the --out folder
  demo.png     loss curves, timing curves, and a picture of which keys were chosen for a sentence
  demo.json    every number
"""

EPILOG = """\
examples:
  sparse-attn demo                              the State of the Union addresses that come with the package
  sparse-attn demo --seconds 20                 a first look; 600 for a better model
  sparse-attn demo --text my.txt --steps 1000   your own text (UTF-8), so many steps however long they take
  sparse-attn demo --top-k 4                    how few keys are enough?
  sparse-attn demo --context 512 --top-k 32     longer windows
  sparse-attn demo --embedding variable         frequent characters wide, rare ones narrow
  sparse-attn demo --lengths 1024 16384         other lengths in the timing (--lengths alone: no timing)
  sparse-attn demo --json | jq .arms            numbers for a program, nothing else on the standard output

exit code: 0 done, 1 the timed kernels disagree, 2 a bad option, 130 ended by Ctrl-C.
The same seed and the same number of steps (--steps) give the same losses again on the CPU.
"""

SECONDS = 90  # of training; with all the rest about two minutes
MOST_STEPS = 2000  # that a fast machine takes unasked: the comparison is made, and the rest is waiting
LENGTHS = (1024, 2048, 4096, 8192)
TIMING_SECONDS = 60.0  # who asks for other lengths waits for them, within bounds


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    number = functools.partial(add, metavar="N")
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument(
        "--seconds",
        type=count(1),
        metavar="S",
        help=f"training time of all arms together, to which the steps are fitted (default {SECONDS}, "
        f"or {MOST_STEPS:,} steps)",
    )
    duration.add_argument("--steps", type=count(1), metavar="N", help="training steps of each arm instead")
    number("--top-k", type=count(1), default=16, help="keys per query (default %(default)s)")
    number("--window", type=count(0), help="how many of them are always the latest (default: a quarter)")
    number("--context", type=count(2), default=256, help="characters in a window (default %(default)s)")
    number("--batch", type=count(1), default=8, help="windows in a training step (default %(default)s)")
    number("--seed", type=count(0), default=0, help="of weights, data order and sample (default 0)")
    number(
        "--lengths",
        type=count(1),
        nargs="*",
        help=f"sequence lengths to time (default {' '.join(map(str, LENGTHS))}); what would take too long "
        "is left out",
    )
    add(
        "--embedding",
        choices=("dense", "variable"),
        default="dense",
        help="variable: a third model, top-k with an embedding and a head of variable width (wide for frequent "
        "characters), planned from the text's own counts at half the parameters",
    )
    add("--text", metavar="FILE", help="train on this UTF-8 text instead of the one in the package")
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, xpu, mps (default auto: an accelerator with kernels of its own, else cpu)",
    )
    add("--out", default="sparse_attn_demo", metavar="DIR", help="where the results go (default %(default)s)")
    add("--json", action="store_true", help="print the JSON instead of bars and tables")


def run(arguments: argparse.Namespace) -> int:
    require("rich")
    require("matplotlib.figure")
    from rich.console import Console

    device = device_of(_preferred_device() if arguments.device == "auto" else arguments.device)
    out = _folder(arguments.out)
    with refusals("--text " if arguments.text else ""):
        corpus = text.load(arguments.text, arguments.context)
    settings = _settings(arguments, device)
    with refusals("--embedding variable: "):
        arms = arms_of(settings, corpus)
    seconds = None if arguments.steps else arguments.seconds or SECONDS
    report = Report(settings, corpus, arms, seconds=seconds)
    # With --json the standard output is the program's; bars go to the other stream, and only for an eye.
    console = Console(stderr=arguments.json, highlight=False)
    try:
        _measure(report, arguments, console)
    except KeyboardInterrupt:
        report.interrupted = True
    except timing.Disagreement as error:
        report.error = str(error)
    report.files = {"json": str(out / "demo.json"), "png": str(out / "demo.png")}
    result = json.dumps(as_json(report), indent=2)
    print(result) if arguments.json else tables.print_report(console, report)
    write_text(out / "demo.json", result + "\n")
    # Last, because a second Ctrl-C may come.
    draw(out / "demo.png", report.corpus.name, report.arms, report.timing, report.keys)
    if report.error:
        print(f"sparse-attn demo: {report.error}", file=sys.stderr)
    return 130 if report.interrupted else 1 if report.error else 0


def _measure(report: Report, arguments: argparse.Namespace, console) -> None:
    """All of it, with bars; what is said before and between them only where no program reads."""
    hidden = arguments.json and not console.is_terminal
    lengths = LENGTHS if arguments.lengths is None else sorted(set(arguments.lengths))
    seconds = timing.SECONDS if arguments.lengths is None else TIMING_SECONDS
    if not arguments.json:
        tables.print_start(console, report)
        _print_notes(console, report)
    with _progress(console, hidden) as progress:
        most = None if arguments.seconds else MOST_STEPS
        session.prepare(report, most, Bar(progress, "measure a step", len(report.arms)))
    if not arguments.json:
        tables.print_plan(console, report, session.seconds_ahead(report, seconds if lengths else 0.0))
    with _progress(console, hidden) as progress:
        session.run(report, lengths, seconds, functools.partial(Bar, progress))


def _print_notes(console, report: Report) -> None:
    if report.settings.top_k >= report.settings.context:
        console.print("Note: --top-k is not below --context, so top-k attention keeps every key here.")
    if report.arms[1].kernel == "reference wing":
        console.print(
            "Note: no compiled kernels here (`sparse-attn doctor` says why), so top-k attention runs in plain "
            "PyTorch, many times slower."
        )


def _settings(arguments: argparse.Namespace, device: torch.device) -> Settings:
    top_k, window = arguments.top_k, arguments.window
    if window is None:
        # Without it a young model, whose scores say little yet, is slow to find the letters just before.
        window = top_k // 4
    if window > top_k:
        raise UsageError(f"--window counts toward --top-k and may not pass it, got {window} and {top_k}")
    return Settings(
        steps=arguments.steps or 0,
        batch=arguments.batch,
        context=arguments.context,
        top_k=top_k,
        window=window,
        seed=arguments.seed,
        device=device,
        embedding=arguments.embedding,
    )


class Bar:
    """One stage's progress bar: shown from the start, its clock running from `begin`."""

    def __init__(self, progress, name: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="", start=False)

    def begin(self) -> None:
        self._progress.start_task(self._task)

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)


def _progress(console, hidden: bool):
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=console,
        disable=hidden,
    )


def _preferred_device() -> str:
    """An accelerator on which top-k attention is more than the plain PyTorch reference, else the CPU."""
    for name in available_devices()[1:]:
        reasons = base.reasons("topk_attention", torch.device(name), torch.float32)
        if any(reason is None for wing, reason in reasons.items() if wing != "reference"):
            return name
    return "cpu"


def _folder(name: str) -> Path:
    """The output folder, made and tried now: not after a minute of work."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {name} cannot be written to: {error.strerror or error}") from None
    return folder
