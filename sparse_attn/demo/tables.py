"""What the demo found, as tables for the eye; `console` is a `rich.console.Console`."""

from __future__ import annotations

import math

from sparse_attn.demo.model import LAYERS, WIDTH
from sparse_attn.demo.report import Report, embedding_of
from sparse_attn.demo.timing import HEAD_DIM, HEADS, Timing
from sparse_attn.demo.train import Arm, Settings


def print_start(console, report: Report) -> None:
    settings, corpus = report.settings, report.corpus
    characters = len(corpus.train) + len(corpus.held_out)
    console.print(
        f"A {LAYERS}-layer GPT of width {WIDTH} learns [bold]{_plain(corpus.name)}[/] ({characters:,} characters, "
        f"the last tenth held out) on {settings.device}: with dense attention, and with each query attending to "
        f"{settings.top_k} of up to {settings.context} keys{_always(settings.window)}{_widened(settings)}."
    )


def print_plan(console, report: Report, seconds: float) -> None:
    """`seconds` that all of it will take."""
    fitted = "" if report.seconds is None else f", fitted to {spoken(report.seconds)} of training"
    console.print(
        f"{report.settings.steps:,} steps of each model{fitted}. [bold]It will take about {spoken(seconds)}[/]; "
        "Ctrl-C ends it early and keeps what it has.\n"
    )


def spoken(seconds: float) -> str:
    """`1 min 50 s`"""
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole if whole < 60 else math.ceil(seconds / 5) * 5, 60)
    return " ".join([f"{minutes} min"] * (minutes > 0) + [f"{rest} s"] * (rest > 0)) or "0 s"


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
    if report.settings.steps and all(len(arm.train_loss) == report.settings.steps for arm in report.arms):
        console.print("  One seed, a short training: a longer one may end the other way round.", style="dim")
        if report.seconds is not None:
            console.print(
                f"  The steps were fitted to the time; --steps {report.settings.steps} --seed "
                f"{report.settings.seed} gives these losses again.",
                style="dim",
            )
    console.print()
    if report.timing and report.timing.seconds:
        console.print(_timing_table(report.timing))
        for what, why in report.timing.skipped.items():
            console.print(f"  – {what} was left out: {why}", style="dim")
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
        title=f"Training: {settings.steps:,} steps of {settings.batch} × {settings.context} tokens "
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
        row(
            "  its and the head's parameters", lambda arm: _number(embedding_of(arm)["parameters"], "{:,.0f}")
        )
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
        cells = [_number(value, "{:,.1f}", 1e3) or "left out" for value in (dense, ours, plain)]
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
