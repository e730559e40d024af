"""`sparse-attn demo`: a small GPT learns real text with top-k attention beside dense attention."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

from sparse_attn.cli import demo_text, demo_timing
from sparse_attn.cli.console import UsageError, available_devices, count, device_of, require
from sparse_attn.cli.demo_keys import chosen_keys
from sparse_attn.cli.demo_plots import draw
from sparse_attn.cli.demo_report import Report, as_json, print_report, print_start
from sparse_attn.cli.demo_train import Settings, arms_of, train
from sparse_attn.wings import base

HELP = "train a small GPT on real text, dense and top-k side by side, and time attention at long lengths"

DESCRIPTION = """\
Trains a small causal GPT (characters as tokens) on a text twice, once with dense attention and once with each query
attending to its --top-k best keys alone: same seed, same data order. (--embedding variable adds a third model, see
below.) Then times one attention at several lengths. About a minute on two cores. Ctrl-C ends it early and keeps what
it has.

What you get: a table (validation loss, speed, peak memory; attention times for scaled_dot_product_attention,
sparse_attn and the same written in plain PyTorch), a text sample of the top-k model, and in the --out folder
  demo.png     loss curves, timing curves, and a picture of which keys were chosen for a sentence
  demo.json    every number
"""

EPILOG = """\
examples:
  sparse-attn demo                              the State of the Union addresses that come with the package
  sparse-attn demo --text my.txt --steps 1000   your own text (UTF-8), longer
  sparse-attn demo --top-k 4                    how few keys are enough?
  sparse-attn demo --context 512 --top-k 32     longer windows
  sparse-attn demo --embedding variable         frequent characters wide, rare ones narrow
  sparse-attn demo --lengths 1024 16384         other lengths in the timing (--lengths alone: no timing)
  sparse-attn demo --json | jq .arms            numbers for a program, nothing else on the standard output

exit code: 0 done, 1 the timed kernels disagree, 2 a bad option, 130 ended by Ctrl-C.
The same seed gives the same losses again on the CPU.
"""

SAMPLE_LENGTH, PROMPT_LENGTH = 320, 60


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    number = functools.partial(add, metavar="N")
    number("--steps", type=count(1), default=300, help="training steps of each arm (default %(default)s)")
    number("--top-k", type=count(1), default=16, help="keys per query (default %(default)s)")
    number("--window", type=count(0), help="how many of them are always the latest (default: a quarter)")
    number("--context", type=count(2), default=256, help="characters in a window (default %(default)s)")
    number("--batch", type=count(1), default=8, help="windows in a training step (default %(default)s)")
    number("--seed", type=count(0), default=0, help="of weights, data order and sample (default 0)")
    number(
        "--lengths",
        type=count(1),
        nargs="*",
        default=[1024, 2048, 4096, 8192],
        help="sequence lengths to time (default 1024 2048 4096 8192)",
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
    corpus = demo_text.load(arguments.text, arguments.context)
    settings = _settings(arguments, device)
    report = Report(settings, corpus, arms=arms_of(settings, corpus))
    # With --json the standard output is the program's; bars go to the other stream, and only for an eye.
    console = Console(stderr=arguments.json, highlight=False)
    if not arguments.json:
        print_start(console, report)
    try:
        with _progress(console, hidden=arguments.json and not console.is_terminal) as progress:
            _measure(report, sorted(set(arguments.lengths)), progress)
    except KeyboardInterrupt:
        report.interrupted = True
    except demo_timing.Disagreement as error:
        report.error = str(error)
    report.files = {"json": str(out / "demo.json"), "png": str(out / "demo.png")}
    text = json.dumps(as_json(report), indent=2)
    print(text) if arguments.json else print_report(console, report)
    (out / "demo.json").write_text(text + "\n", "utf-8")
    # Last, because it takes longest, and a second Ctrl-C may come.
    draw(out / "demo.png", report.corpus.name, report.arms, report.timing, report.keys)
    if report.error:
        print(f"sparse-attn demo: {report.error}", file=sys.stderr)
    return 130 if report.interrupted else 1 if report.error else 0


def _settings(arguments: argparse.Namespace, device: torch.device) -> Settings:
    top_k, window = arguments.top_k, arguments.window
    if window is None:
        # Without it a young model, whose scores say little yet, is slow to find the letters just before.
        window = top_k // 4
    if window > top_k:
        raise UsageError(f"--window counts toward --top-k and may not pass it, got {window} and {top_k}")
    return Settings(
        steps=arguments.steps,
        batch=arguments.batch,
        context=arguments.context,
        top_k=top_k,
        window=window,
        seed=arguments.seed,
        device=device,
        embedding=arguments.embedding,
    )


def _measure(report: Report, lengths: list[int], progress) -> None:
    """Fills the report in place, so that an interruption keeps what is there."""
    settings, corpus = report.settings, report.corpus
    training = [Bar(progress, f"train {arm.name}", settings.steps) for arm in report.arms]
    sampling = Bar(progress, "sample", SAMPLE_LENGTH)
    timing = Bar(progress, "timing", len(lengths)) if lengths else None
    for arm, bar in zip(report.arms, training, strict=True):
        bar.begin()
        train(arm, corpus, settings, lambda loss, bar=bar: bar.advance(f"loss {loss:.3f}"))

    sampling.begin()
    model = report.arms[1].model
    report.keys = chosen_keys(model, corpus)
    report.prompt = demo_text.opening(corpus, min(PROMPT_LENGTH, settings.context))
    for token in model.generate(corpus.encode(report.prompt), SAMPLE_LENGTH, settings.seed):
        report.sample += corpus.alphabet[token]
        sampling.advance()

    if timing:
        timing.begin()
        report.timing = demo_timing.start(settings.top_k, settings.device)
        for done in demo_timing.measure(report.timing, lengths, settings.device, settings.seed):
            timing.advance(f"T={done:,} done")


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
        reasons = base.reasons("topk_attention", name, torch.float32)
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
