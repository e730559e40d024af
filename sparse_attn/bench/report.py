"""The results as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_attn.bench import registry
from sparse_attn.bench.attention import LABELS
from sparse_attn.bench.machine import in_words


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
        ("headline", "Ours against the alternatives"),
        ("real", "The same on a language model's own queries and keys"),
        ("know_before_use", "Know before use: where it pays little or nothing, and what options cost"),
    ):
        if results[key]:
            console.print(comparison_table(title, results[key]))
    if results["scaling"]:
        console.print(_scaling_table(results["scaling"]))
    if results["memory"] or results["overhead"]:
        console.print(_other_table(results))
    for line in results["left_out"]:
        console.print(f"[dim]left out: {escape(line)}[/]", highlight=False)
    judged = [met for met in _judgements(results) if met is not None]
    if judged:
        console.print(f"\n[bold]{sum(judged)} of {len(judged)} targets met.[/]")


def comparison_table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("call")
    for name in ("sparse_attn", "rival's time", "times as fast", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        labels = registry.op(row["op"]).labels
        first = row["name"] + (f"\n[dim]{row['note']}[/]" if row["note"] else "")
        if not row["rivals"]:  # all were left out
            table.add_row(first, milliseconds(row["milliseconds"]))
        for name, rival in row["rivals"].items():
            target = rival["target"]
            table.add_row(
                first,
                milliseconds(row["milliseconds"]) if first else "",
                f"{labels[name]}: {milliseconds(rival['milliseconds'])}",
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
        detail = f"{megabytes(row['of_which_returned_mb'])} of it is returned"
        if "score_matrix_mb" in row:
            detail += f"; the scores of all heads would be {megabytes(row['score_matrix_mb'])}"
        at = f" T={row['length']}" if "length" in row else ""
        who = row["op"] if "length" in row else row["contender"]
        table.add_row(
            f"peak memory beyond inputs, outputs included: {who} {row['direction']}{at}\n[dim]{detail}[/]",
            megabytes(row["extra_mb"]),
            _memory_target(row),
            _coloured(_memory_met(row)),
        )
    call = results["overhead"]
    if call:
        table.add_row(
            f"one call at T={call['length']} without gradients\n[dim]SDPA: {call['sdpa_microseconds']:.0f} µs[/]",
            f"{call['microseconds']:.0f} µs",
            f"< {call['target_us']} µs",
            _coloured(call["met"]),
        )
    return table


def _memory_target(row: dict) -> str:
    if row["target_mb"] is not None:
        return f"< {row['target_mb']} MB"
    return "" if row.get("target") is None else f"≥ {row['target']:g} × ours"


def _memory_met(row: dict) -> bool | None:
    if row["target_mb"] is not None or row.get("target") is None:
        return row["met"]
    return row["over_ours"] >= row["target"]


def _judgements(results: dict) -> list[bool | None]:
    compared = [rival["met"] for row in results["headline"] for rival in row["rivals"].values()]
    call = results["overhead"]
    return [*compared, *map(_memory_met, results["memory"]), call["met"] if call else None]


def print_own_shape(results: dict, console: Console) -> None:
    """The table of a shape of one's own, what was left out, and the verdict."""
    console.print(f"\n[bold]{escape(results['setting'])}[/]; {escape(in_words(results['machine']))}")
    if results["headline"]:
        console.print(
            comparison_table("topk_attention beside what you would call instead", results["headline"])
        )
    for line in results["left_out"]:
        console.print(f"[dim]left out: {escape(line)}[/]", highlight=False)
    for sentence in results["verdict"]:
        console.print(f"\n[bold]{escape(sentence)}[/]", highlight=False)
