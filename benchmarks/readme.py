"""The tables of README.md and docs, made from the committed results.

python -m benchmarks.readme            prints them
python -m benchmarks.readme --write    puts them between the markers in the files
python -m benchmarks.readme --check    fails where a file differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from sparse_attn.bench import registry
from sparse_attn.bench.attention import LABELS as OURS_AND_DENSE
from sparse_attn.bench.machine import in_words
from sparse_attn.bench.report import mark, megabytes, milliseconds, times_as_fast

# by the short names of the attention suite's results
LABELS: dict[str, str] = {}
for _op in registry.suite("attention"):
    LABELS |= _op.labels
LABELS |= OURS_AND_DENSE | registry.op("topk_select").labels
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


# The commands of results that are older than the present layout.
EXPERIMENT = "python -m benchmarks.experiments"
RENAMED = {
    "python -m benchmarks.run": "sparse-attn bench",
    "python -m benchmarks.widths": "sparse-attn bench --suite widths",
    **{
        f"python -m benchmarks.{name}": f"{EXPERIMENT}.{name}"
        for name in ("cheap_selection", "compress_embedding", "residual_error", "selection_mass")
    },
}


def command(results: dict) -> str:
    """The command that measures this, as it is called today."""
    recorded = results["machine"]["command"].replace(" --no-suites", "")
    for old, new in RENAMED.items():
        if recorded.split(" --")[0] == old:
            return recorded.replace(old, new, 1)
    return recorded


def summary(results: dict) -> str:
    """For the README: five rows that say when it pays, and when not; all others are in docs/performance.md."""
    rows = {row["name"]: row for key in ("headline", "real", "know_before_use") for row in results[key]}
    lines = [
        f"Measured on {in_words(results['machine'])}; {results['setting']} unless the row says otherwise. “As fast” is "
        "the other's time over ours: below 1× the other is quicker. fwd+bwd is forward and backward; “real” rows use a "
        "language model's own queries and keys, the others independent random numbers.",
        "",
        "| call | sparse_attn | instead of | its time | as fast |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for name in README_ROWS:
        rival = rows[name]["rivals"]["sdpa"]
        note = f" ({rows[name]['note']})" if rows[name]["note"] else ""
        lines.append(_row(name + note, rows[name]["milliseconds"], LABELS["sdpa"], rival["milliseconds"]))
    widths = json.loads((RESULTS / "widths_cpu.json").read_text("utf-8"))
    loss, dense = "variable_width_cross_entropy", "F.linear + F.cross_entropy, dense head"
    times = {
        row["contender"]: row["milliseconds"]
        for row in widths["rows"]
        if (row["op"], row["ids"], row["direction"]) == (loss, "real", "forward + backward")
    }
    shape = ", ".join(widths["loss"].split(", ")[:3])
    day, cpu = widths["machine"]["date"][:10], widths["machine"]["cpu"]
    same = results["machine"]["date"].startswith(day) and results["machine"]["cpu"] == cpu
    measured = "" if same else f" (measured {day} on {cpu})"
    lines.append(_row(f"{loss} {shape} fwd+bwd{measured}", times["sparse_attn"], dense, times[dense]))
    return "\n".join(lines)


# The rows of README.md that have SDPA as their rival; the loss of the widths is the fifth.
README_ROWS = (
    "topk_attention T=4096 float32 fwd",
    "topk_attention T=4096 float32 fwd+bwd real",
    "gathered_attention T=8192 float32 fwd",
    "topk_attention T=8192 float32 fwd Tq=1",
)


def _row(call: str, ours: float, rival: str, its: float) -> str:
    return f"| {call} | {milliseconds(ours)} | {rival} | {milliseconds(its)} | {times_as_fast(its / ours)} |"


def details(results: dict) -> str:
    """For docs/performance.md: every comparison with its target, and the scaling."""
    lines = [f"Measured on {in_words(results['machine'])} by `{command(results)}`.", ""]
    for key, title in (
        ("headline", "Random inputs"),
        ("real", "A language model's own queries and keys"),
        ("know_before_use", "Know before use"),
    ):
        if results[key]:
            lines += [f"### {title}", "", *_full_table(results[key]), ""]
    if results["real"] and results["real_inputs"]:
        origin = results["real_inputs"]
        lines += [f"The real inputs are those of {origin['model']} over the text {origin['text']}.", ""]
    lines += ["### Scaling", "", *_scaling_table(results["scaling"]), "", "### Memory and overhead", ""]
    return "\n".join([*lines, *_sentences(results)])


def _full_table(rows: list[dict]) -> list[str]:
    lines = [
        "| call | sparse_attn | rival | its time | as fast | target | |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        for name, rival in row["rivals"].items():
            target = "" if rival["target"] is None else f"≥ {rival['target']:.3g}×"
            lines.append(
                f"| {row['name']}{note} | {milliseconds(row['milliseconds'])} | {LABELS[name]} "
                f"| {milliseconds(rival['milliseconds'])} | {times_as_fast(rival['faster'])} "
                f"| {target} | {mark(rival['met'])} |"
            )
    return lines


def beside_sdpa(results: dict) -> str:
    """For another machine than that of the full table: every row that has SDPA as a rival."""
    lines = [
        f"Measured on {in_words(results['machine'])} by `{command(results)}`; {results['setting']} unless the row "
        "says otherwise.",
        "",
        "| call | sparse_attn | SDPA | as fast | target | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in (row for key in ("headline", "real", "know_before_use") for row in results[key]):
        rival = row["rivals"].get("sdpa")
        if rival is None:
            continue
        target = "" if rival["target"] is None else f"≥ {rival['target']:.3g}×"
        lines.append(
            f"| {row['name']} | {milliseconds(row['milliseconds'])} | {milliseconds(rival['milliseconds'])} "
            f"| {times_as_fast(rival['faster'])} | {target} | {mark(rival['met'])} |"
        )
    return "\n".join(lines)


def _scaling_table(scaling: dict[str, dict]) -> list[str]:
    lengths = sorted({n for points in scaling.values() for n in points["lengths"]})
    lines = [
        "| forward, float32 | " + " | ".join(f"T={n}" for n in lengths) + " | grows as |",
        "| --- |" + " ---: |" * (len(lengths) + 1),
    ]
    for name, points in scaling.items():
        at = dict(zip(points["lengths"], points["milliseconds"], strict=True))
        cells = [milliseconds(at[n]) if n in at else "" for n in lengths]
        growth = "" if points["exponent"] is None else f"T^{points['exponent']:.2f}"
        lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} | {growth} |")
    return lines


def _sentences(results: dict) -> list[str]:
    lines = []
    for row in results["headline"]:
        for name in ("plain", "plain_tuned"):
            if name in row["rivals"]:
                rival = row["rivals"][name]
                target = (
                    ""
                    if rival["target"] is None
                    else f" (target ≥ {rival['target']:g}×: {mark(rival['met'])})"
                )
                lines.append(
                    f"- {row['name']} takes {milliseconds(row['milliseconds'])}; {LABELS[name]} takes "
                    f"{milliseconds(rival['milliseconds'])}: "
                    f"{times_as_fast(rival['faster'])} as fast{target}."
                )
    for row in results["memory"]:
        target = "" if row["target_mb"] is None else f" (target < {row['target_mb']} MB: {mark(row['met'])})"
        lines.append(
            f"- Peak memory beyond the inputs, {row['op']} {row['direction']} at T={row['length']}: "
            f"{megabytes(row['extra_mb'])}{target}, of which {megabytes(row['of_which_returned_mb'])} are the "
            f"results; stored scores would take {megabytes(row['score_matrix_mb'])}."
        )
    call = results["overhead"]
    lines.append(
        f"- One call at T={call['length']} without gradients: {call['microseconds']:.0f} µs "
        f"(target < {call['target_us']} µs: {mark(call['met'])}; SDPA {call['sdpa_microseconds']:.0f} µs)."
    )
    grows = [
        f"{LABELS.get(name, name)} as T^{points['exponent']:.2f}"
        for name, points in results["scaling"].items()
        if points["exponent"] is not None
    ]
    if grows:
        lines.append(f"- The time grows: {', '.join(grows)}.")
    return lines


def widths(results: dict) -> str:
    """The lookup and the loss against each alternative, and memory."""
    lines = [
        f"Measured on {in_words(results['machine'])} by `{command(results)}`. "
        "“As fast” is the alternative's time over ours: below 1× it is quicker.",
    ]
    for op, setting in (
        ("variable_width_embedding", results["lookup"]),
        ("variable_width_cross_entropy", results["loss"]),
    ):
        rows = [row for row in results["rows"] if row["op"] == op]
        lines += ["", f"`{op}`, {setting}:", ""]
        lines += ["| ids | direction | alternative | sparse_attn | its time | as fast | target | |"]
        lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | --- |"]
        ours = {(r["ids"], r["direction"]): r for r in rows if r["contender"] == "sparse_attn"}
        for row in (r for r in rows if r["contender"] != "sparse_attn"):
            own = ours[row["ids"], row["direction"]]["milliseconds"]
            target, met = row["target"], None if row["target"] is None else row["over_ours"] >= row["target"]
            lines.append(
                f"| {row['ids']} | {row['direction']} | {row['contender']} | {milliseconds(own)} "
                f"| {milliseconds(row['milliseconds'])} | {times_as_fast(row['over_ours'])} "
                f"| {'' if target is None else f'≥ {target:.2f}×'} | {mark(met)} |"
            )
    if results["memory"]:
        peaks = ", ".join(f"{row['contender']} {megabytes(row['extra_mb'])}" for row in results["memory"])
        lines += ["", f"Peak memory of the loss, forward + backward, beyond the inputs: {peaks}."]
    return "\n".join(lines)


def compression(results: dict) -> str:
    """What a trained model loses when its table gets fewer parameters."""
    full, *rows = results["rows"]
    tokens = results["tokens"]
    lines = [
        f"{results['model']}, table and tied head replaced, nothing retrained; counts + 1 from {tokens['counted']:,} "
        f"tokens, cross-entropy (nats per token) of {tokens['evaluated']:,} tokens of {len(results['texts'])} other "
        f"documents of the same kind. The full table ({full['parameters']:,} parameters): {full['cross_entropy']:.3f}.",
        "",
        "| parameters | rule | widths | table error, counted text | table error, other text | cross-entropy | change |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        change = row["cross_entropy"] - full["cross_entropy"]
        widths = "one" if row["bands"] is None else ", ".join(map(str, row["bands"][1]))
        name = "uniform low rank" if row["bands"] is None else f"`{row['table']}`"
        lines.append(
            f"| {row['parameters'] / full['parameters']:.0%} | {name} | {widths} | {row['error_counted']:.2%} "
            f"| {row['error_text']:.2%} | {row['cross_entropy']:.3f} | {change:+.3f} |"
        )
    return "\n".join(lines)


def cheap_selection(results: dict) -> str:
    """Every cheap selection beside dense or exact attention."""
    lines = [
        f"Measured on {in_words(results['machine'])} by `{command(results)}`; {results['setting']}. "
        "“As fast” is relative to the first row of each table.",
    ]
    for group in dict.fromkeys(row["group"] for row in results["rows"]):
        lines += ["", f"| {group} | time | as fast | target | |", "| --- | ---: | ---: | ---: | --- |"]
        for row in (r for r in results["rows"] if r["group"] == group):
            target = "" if row["target"] is None else f"≥ {row['target']:g}×"
            met = None if row["target"] is None else row["faster"] >= row["target"]
            lines.append(
                f"| {row['call']} | {milliseconds(row['milliseconds'])} | {times_as_fast(row['faster'])} "
                f"| {target} | {mark(met)} |"
            )
    return "\n".join(lines)


def _by_budget(results: dict, what: str, text: str) -> str:
    """Rows by name, columns by keys per query."""
    origin = results["real_inputs"]
    lines = [
        f"{text}, T={results['length']:,}, {origin['model']} over the text {origin['text']}, by "
        f"`{command(results)}`:",
        "",
        f"| {what} | " + " | ".join(f"{n} keys" for n in results["budgets"]) + " |",
        "| --- |" + " ---: |" * len(results["budgets"]),
    ]
    for name, values in results["rows"].items():
        cells = [f"{values[n]:.3f}" if n in values else "" for n in results["budgets"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selection_mass(results: dict) -> str:
    return _by_budget(results, "selection", "Share of the attention mass that the chosen keys hold")


def residual_error(results: dict) -> str:
    return _by_budget(
        results, "what the mass left out goes to", "Relative error of the output, exact selection per head"
    )


# marker → (results, what makes the table, the command that makes the results), per file
BLOCKS = {
    "README.md": {
        "benchmark": ("attention_cpu", summary, "sparse-attn bench"),
    },
    "docs/performance.md": {
        "benchmark": ("attention_cpu", details, "sparse-attn bench"),
        "zen4": ("attention_zen4", beside_sdpa, "sparse-attn bench --name attention_zen4"),
        "amx": ("attention_amx", beside_sdpa, "sparse-attn bench --name attention_amx"),
        "zen3": ("topk_attention_zen3", beside_sdpa, "sparse-attn bench --name topk_attention_zen3"),
        "avx2": ("topk_attention_avx2", beside_sdpa, "sparse-attn bench --name topk_attention_avx2"),
        "widths": ("widths_cpu", widths, "sparse-attn bench --suite widths"),
    },
    "docs/cheap_selection.md": {
        "cheap_selection": (
            "cheap_selection_cpu",
            cheap_selection,
            "python -m benchmarks.experiments.cheap_selection",
        ),
        "selection_mass": (
            "selection_mass_smollm2",
            selection_mass,
            "python -m benchmarks.experiments.selection_mass",
        ),
        "residual_error": (
            "residual_error_smollm2",
            residual_error,
            "python -m benchmarks.experiments.residual_error",
        ),
    },
    "docs/planner.md": {
        "compression": (
            "compress_embedding_smollm2",
            compression,
            "python -m benchmarks.experiments.compress_embedding",
        )
    },
}


def filled(text: str, marker: str, table: str) -> str:
    """The file's text with the table between its markers."""
    marked = re.compile(rf"(<!-- {marker}: begin -->\n).*?(<!-- {marker}: end -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"no <!-- {marker}: begin --> … <!-- {marker}: end --> in the text")
    return marked.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update the files")
    parser.add_argument("--check", action="store_true", help="fail if the files are out of date")
    args = parser.parse_args(argv)
    stale = []
    for name, blocks in BLOCKS.items():
        path = ROOT / name
        text = path.read_text("utf-8")
        for marker, (source, make, how) in blocks.items():
            results = RESULTS / f"{source}.json"
            table = (
                make(json.loads(results.read_text("utf-8")))
                if results.exists()
                else f"*No results are committed yet; `{how}` makes them.*"
            )
            if not args.write and not args.check:
                print(f"<!-- {name}: {marker} -->\n{table}\n")
            text = filled(text, marker, table)
        if args.write:
            path.write_text(text, "utf-8")
        elif args.check and text != path.read_text("utf-8"):
            stale.append(name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run `python -m benchmarks.readme --write`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
