"""The results as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.contenders import LABELS
from benchmarks.machine import in_words


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def times_as_fast(faster: float) -> str:
    return f"{faster:.1f}×" if faster >= 10 else f"{faster:.2f}×" if faster >= 0.1 else f"{faster:.1g}×"


def megabytes(value: float) -> str:
    return f"{value:.0f} MB" if value < 1000 else f"{value / 1e3:,.1f} GB"


def mark(met: bool | None) -> str:
    return "" if met is None else "met" if met else "falls short"


def _coloured(met: bool | None) -> str:
    return {None: "", True: "[green]✓ met[/]", False: "[red]✗ falls short[/]"}[met]


def print_results(results: dict, console: Console) -> None:
    """Every figure beside its target, and what was left out and why."""
    console.print(f"\n[bold]{escape(results['setting'])}[/]; {escape(in_words(results['machine']))}")
    if results["quick"]:
        console.print("[yellow]--quick: few rounds; take the figures as a smoke test.[/]")
    for key, title in (
        ("headline", "Ours against the alternatives (random inputs)"),
        ("real", "The same on a language model's own queries and keys"),
        ("know_before_use", "Know before use: where it pays little or nothing, and what options cost"),
    ):
        if results[key]:
            console.print(_comparison_table(title, results[key]))
    console.print(_scaling_table(results["scaling"]))
    console.print(_other_table(results))
    for line in results["left_out"]:
        console.print(f"[dim]left out: {escape(line)}[/]", highlight=False)
    if results["suites"]:
        console.print(f"[dim]the pytest suites' {len(results['suites'])} timings are in the JSON[/]")
    judged = [met for met in _judgements(results) if met is not None]
    if judged:
        console.print(f"\n[bold]{sum(judged)} of {len(judged)} targets met.[/]")


def _comparison_table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("call")
    for name in ("sparse_attn", "rival's time", "times as fast", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        first = row["name"] + (f"\n[dim]{row['note']}[/]" if row["note"] else "")
        for name, rival in row["rivals"].items():
            target = rival["target"]
            table.add_row(
                first,
                milliseconds(row["milliseconds"]) if first else "",
                f"{LABELS[name]}: {milliseconds(rival['milliseconds'])}",
                times_as_fast(rival["faster"]),
                "" if target is None else f"≥ {target:.3g}×",
                _coloured(rival["met"]),
            )
            first = ""
        table.add_section()
    return table


def _scaling_table(scaling: dict[str, dict]) -> Table:
    lengths = sorted({n for points in scaling.values() for n in points["lengths"]})
    table = Table(title="Time of one forward over T, float32", title_justify="left", title_style="bold")
    table.add_column("op")
    for length in lengths:
        table.add_column(f"T={length}", justify="right")
    table.add_column("time grows as", justify="right")
    for name, points in scaling.items():
        at = dict(zip(points["lengths"], points["milliseconds"], strict=True))
        fitted = points["exponent"]
        table.add_row(
            LABELS.get(name, name),
            *(milliseconds(at[n]) if n in at else "" for n in lengths),
            "" if fitted is None else f"T^{fitted:.2f}",
        )
    return table


def _other_table(results: dict) -> Table:
    table = Table(title="Memory and overhead", title_justify="left", title_style="bold")
    for name, justify in (("what", "left"), ("measured", "right"), ("target", "right"), ("", "left")):
        table.add_column(name, justify=justify)
    for row in results["memory"]:
        table.add_row(
            f"peak memory beyond inputs, outputs included: {row['op']} {row['direction']} T={row['length']}\n"
            f"[dim]{megabytes(row['of_which_returned_mb'])} of it is returned; "
            f"the scores of all heads would be {megabytes(row['score_matrix_mb'])}[/]",
            megabytes(row["extra_mb"]),
            "" if row["target_mb"] is None else f"< {row['target_mb']} MB",
            _coloured(row["met"]),
        )
    call = results["overhead"]
    table.add_row(
        f"one call at T={call['length']} without gradients\n[dim]SDPA: {call['sdpa_microseconds']:.0f} µs[/]",
        f"{call['microseconds']:.0f} µs",
        f"< {call['target_us']} µs",
        _coloured(call["met"]),
    )
    return table


def _judgements(results: dict) -> list[bool | None]:
    compared = [rival["met"] for row in results["headline"] for rival in row["rivals"].values()]
    return [*compared, *(row["met"] for row in results["memory"]), results["overhead"]["met"]]
