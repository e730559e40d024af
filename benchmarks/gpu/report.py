"""What a GPU run found: beside its targets, as a table, as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
