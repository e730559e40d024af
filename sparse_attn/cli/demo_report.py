"""What the demo found, as a table for the eye and as JSON for programs."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field

import torch

import sparse_attn
from sparse_attn.cli.demo_keys import ChosenKeys
from sparse_attn.cli.demo_model import HEADS as MODEL_HEADS
from sparse_attn.cli.demo_model import LAYERS, WIDTH
from sparse_attn.cli.demo_text import Corpus
from sparse_attn.cli.demo_timing import HEAD_DIM, HEADS, Timing
from sparse_attn.cli.demo_train import Arm, Settings


@dataclass
class Report:
    """Filled as the demo goes."""

    settings: Settings
    corpus: Corpus
    arms: list[Arm]
    prompt: str = ""
    sample: str = ""
    keys: ChosenKeys | None = None
    timing: Timing | None = None
    interrupted: bool = False
    error: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def as_json(report: Report) -> dict:
    """Everything, as plain data."""
    settings = {**asdict(report.settings), "device": str(report.settings.device)}
    return {
        "settings": settings,
        "versions": {
            "sparse_attn": sparse_attn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "text": {
            "name": report.corpus.name,
            "characters": len(report.corpus.train) + len(report.corpus.held_out),
            "held_out_characters": len(report.corpus.held_out),
            "alphabet": len(report.corpus.alphabet),
        },
        "model": {"layers": LAYERS, "width": WIDTH, "heads": MODEL_HEADS},
        "arms": {arm.name: _arm(arm) for arm in report.arms},
        "sample": {"prompt": report.prompt, "text": report.sample},
        "timing": _timing(report.timing),
        "chosen_keys": asdict(report.keys) if report.keys else None,
        "interrupted": report.interrupted,
        "error": report.error,
        "files": report.files,
    }


def _arm(arm: Arm) -> dict:
    nats = arm.validation_loss
    return {
        "top_k": arm.top_k,
        "window": arm.window,
        "kernel": arm.kernel,
        "embedding": _embedding(arm),
        "steps_done": len(arm.train_loss),
        "validation_nats_per_character": _finite(nats),
        "validation_bits_per_character": _finite(nats / math.log(2)) if nats is not None else None,
        "tokens_per_second": arm.tokens_per_second,
        "peak_memory_bytes": arm.peak_memory,
        "seconds": sum(arm.step_seconds),
        "train_loss": [_finite(loss) for loss in arm.train_loss],
        "validation": [{"step": step, "nats_per_character": _finite(loss)} for step, loss in arm.validation],
    }


def _embedding(arm: Arm) -> dict:
    """Of the embedding and the head: how wide, and how many numbers together (None before the model is made)."""
    plan = arm.plan
    return {
        "widths": [WIDTH] if plan is None else list(plan.widths),
        "characters": None if plan is None else list(plan.band_sizes),
        "parameters": arm.model.vocabulary_parameters() if arm.model else None,
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _timing(timing: Timing | None) -> dict | None:
    if timing is None:
        return None
    shape = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "causal": True}
    return {
        "wing": timing.wing,
        "top_k": timing.top_k,
        "shape": shape,
        "seconds": {str(length): row for length, row in timing.seconds.items()},
        "skipped": timing.skipped,
        "largest_error_against_plain_pytorch": timing.largest_error,
    }


def print_start(console, report: Report) -> None:
    settings, corpus = report.settings, report.corpus
    characters = len(corpus.train) + len(corpus.held_out)
    console.print(
        f"A {LAYERS}-layer GPT of width {WIDTH} learns [bold]{_plain(corpus.name)}[/] ({characters:,} characters, "
        f"the last tenth held out) on {settings.device}: with dense attention, and with each query attending to "
        f"{settings.top_k} of up to {settings.context} keys{_always(settings.window)}{_widened(settings)}. "
        "Ctrl-C ends it early and keeps what it has.\n"
    )
    if settings.top_k >= settings.context:
        console.print("Note: --top-k is not below --context, so top-k attention keeps every key here.\n")
    if report.arms[1].kernel == "reference wing":
        console.print(
            "Note: no compiled kernels here (`sparse-attn doctor` says why), so top-k attention runs in plain "
            "PyTorch, many times slower.\n"
        )


def _always(window: int) -> str:
    return f", the latest {window} always among them" if window else ""


def _widened(settings: Settings) -> str:
    if settings.embedding == "dense":
        return ""
    return "; a third time so, with an embedding and a head that are wide for frequent characters alone"


def print_report(console, report: Report) -> None:
    if report.interrupted:
        console.print("\n[bold]Ended by Ctrl-C[/]; this is what was done until then.")
    console.print(_training_table(report))
    if all(len(arm.train_loss) == report.settings.steps for arm in report.arms):
        console.print("  One seed, a short training: a longer one may end the other way round.", style="dim")
    console.print()
    if report.timing and report.timing.seconds:
        console.print(_timing_table(report.timing))
        for what, why in report.timing.skipped.items():
            console.print(f"  – {what}: not run, {why}", style="dim")
        console.print(f"  {_where_it_pays(report.timing)}\n", style="dim")
    if report.sample:
        console.print("[bold]A sample of the top-k model[/], the prompt in grey:")
        console.print(f"[dim]{_plain(report.prompt)}[/]{_plain(report.sample.rstrip())}\n")
    for file in report.files.values():
        console.print(f"  → {_plain(file)}", soft_wrap=True)


def _plain(text: str) -> str:
    """A text that rich prints as it is."""
    from rich.markup import escape

    return escape(text)


def _training_table(report: Report):
    from rich.table import Table

    settings = report.settings
    table = Table(
        title=f"Training: {settings.steps} steps of {settings.batch} × {settings.context} tokens "
        "(1 token = 1 character)"
    )
    table.title_justify = "left"
    table.add_column("", no_wrap=True)
    for arm in report.arms:
        keys = "all keys" if arm.top_k is None else f"{arm.top_k} keys a query"
        table.add_column(f"{arm.name} ({keys})", justify="right")

    def row(name: str, cell) -> None:
        table.add_row(name, *(cell(arm) or "–" for arm in report.arms))

    def loss(arm: Arm) -> str | None:
        cell = _number(arm.validation_loss, "{:.3f}")
        # Of an arm that was cut short, which step it is of: it must not be read beside the other's last.
        return (
            cell
            if len(arm.train_loss) == settings.steps
            else cell and f"{cell} (step {arm.validation[-1][0]})"
        )

    row("validation loss (nats/token)", loss)
    row("  in bits/token", lambda arm: _number(arm.validation_loss, "{:.3f}", 1 / math.log(2)))
    row("training speed (tokens/s)", lambda arm: _number(arm.tokens_per_second, "{:,.0f}"))
    row("peak memory (MB)", lambda arm: _number(arm.peak_memory, "{:,.0f}", 1e-6))
    row("attention by", lambda arm: arm.kernel)
    if any(arm.plan for arm in report.arms):
        row("widths of the embedding", lambda arm: _widths(arm))
        row("  its and the head's parameters", lambda arm: _number(_embedding(arm)["parameters"], "{:,.0f}"))
    if any(len(arm.train_loss) < settings.steps for arm in report.arms):
        row("steps done", lambda arm: f"{len(arm.train_loss)} of {settings.steps}")
    return table


def _widths(arm: Arm) -> str:
    if arm.plan is None:
        return str(WIDTH)
    return ", ".join(f"{w} ({n})" for w, n in zip(arm.plan.widths, arm.plan.band_sizes, strict=True))


def _number(value: float | None, form: str, factor: float = 1.0) -> str | None:
    return None if value is None else form.format(value * factor)


def _ratio(value: float) -> str:
    return f"{value:.1f}×" if value >= 1 else f"{value:.2f}×"


def _timing_table(timing: Timing):
    from rich.table import Table

    table = Table(
        title=f"Milliseconds of one causal attention, forward: {HEADS} heads of {HEAD_DIM}, float32,\n"
        f"{timing.top_k} keys a query; dense (SDPA), top-k ({timing.wing} wing), top-k in plain PyTorch"
    )
    table.title_justify = "left"
    for name in ("T", "SDPA", "top-k", "plain PyTorch", "SDPA ÷ top-k", "plain ÷ top-k"):
        table.add_column(name, justify="right")
    for length, row in timing.seconds.items():
        dense, ours, plain = (row[name] for name in ("SDPA", "top-k", "plain PyTorch"))
        cells = [_number(value, "{:,.1f}", 1e3) or "–" for value in (dense, ours, plain)]
        ratios = [_ratio(other / ours) if other and ours else "–" for other in (dense, plain)]
        table.add_row(f"{length:,}", *cells, *ratios)
    return table


def _where_it_pays(timing: Timing) -> str:
    """One honest sentence from the numbers above it."""
    both = [
        (t, row["SDPA"], row["top-k"]) for t, row in timing.seconds.items() if row["SDPA"] and row["top-k"]
    ]
    faster = [length for length, dense, ours in both if ours < dense]
    if not both:
        return ""
    if not faster:
        return "Here top-k attention took longer than dense attention at every length timed."
    if len(faster) == len(both):
        return "Here top-k attention was faster than dense attention at every length timed."
    where = ", ".join(f"{length:,}" for length in faster)
    return f"Here top-k attention was faster than dense attention at T = {where}, and slower elsewhere."
