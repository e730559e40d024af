"""The results as one picture that can be read without the text."""

from __future__ import annotations

from pathlib import Path

from sparse_attn.bench import registry
from sparse_attn.bench.attention import LABELS
from sparse_attn.bench.machine import in_words

SHORT = {"sdpa": "dense SDPA", "plain": "plain PyTorch"}
OURS, RIVAL, BAD, INK = "#1f6f8b", "#b0b7bd", "#c8553d", "#222222"


def draw(results: dict, path: Path) -> None:
    """One picture of a suite: of attention four panels, of others the ratios of each op."""
    _draw_attention(results, path) if results["scaling"] else draw_ratios(results, path)


def draw_ratios(results: dict, path: Path) -> None:
    """A panel per op: every rival's time over ours."""
    plt = _pyplot()
    rows = [row for section in ("headline", "real", "know_before_use") for row in results.get(section, [])]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    most = max([1, *(sum(len(r["rivals"]) for r in rows if r["op"] == op) for op in ops)])
    size = (9.5 * max(1, len(ops)), max(4, 0.32 * most + 2))
    figure, axes = plt.subplots(1, max(1, len(ops)), figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(f"sparse_attn: {results['setting']}", fontsize=11, weight="bold", wrap=True)
    figure.supxlabel(in_words(results["machine"]), fontsize=8, color="#555555")
    for axis, op in zip(axes[0], ops, strict=False):
        bars = [
            (f"{row['name']}\nvs {registry.op(op).labels[name]}", rival["faster"], rival["target"])
            for row in rows
            if row["op"] == op
            for name, rival in row["rivals"].items()
        ]
        ratio_bars(axis, bars, f"{op}: the alternative's time over ours (right of 1: ours is faster)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_attention(results: dict, path: Path) -> None:
    """The ratios beside their targets, the scaling, where it does not pay, the memory."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(18, 16), width_ratios=(1.2, 1), layout="constrained")
    figure.suptitle(f"sparse_attn: exact top-k attention ({results['setting']})", fontsize=15, weight="bold")
    figure.supxlabel(in_words(results["machine"]), fontsize=9, color="#555555")
    bars = [
        (f"{row['name']}  vs {SHORT[name]}", rival["faster"], rival["target"])
        for row in results["headline"] + results["real"]
        for name, rival in row["rivals"].items()
        if name in SHORT
    ]
    ratio_bars(axes[0, 0], bars, "How many times as fast as the alternative (right of 1: faster)")
    _scaling(axes[0, 1], results["scaling"])
    slow = [
        (f"{row['name']}\n{row['note']}" if row["note"] else row["name"], rival["faster"], rival["target"])
        for row in results["know_before_use"]
        for rival in row["rivals"].values()
    ]
    ratio_bars(axes[1, 0], slow, "Know before use: times as fast as dense SDPA (left of 1: do not use it)")
    _memory(axes[1, 1], results["memory"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ratio_bars(axis, bars: list[tuple[str, float, float | None]], title: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    if not bars:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    places = range(len(bars))
    axis.barh(places, [b[1] - 1 for b in bars], left=1, color=[OURS if b[1] >= 1 else BAD for b in bars])
    axis.set_xscale("log")
    axis.axvline(1, color=INK, linewidth=1)
    for place, (_, faster, target) in zip(places, bars, strict=True):
        if target is not None:
            axis.plot([target, target], [place - 0.45, place + 0.45], color=INK, linewidth=2.5)
        axis.annotate(
            f"{faster:.2g}×" if faster < 10 else f"{faster:.0f}×",
            (faster, place),
            xytext=(6 if faster >= 1 else -6, 0),
            textcoords="offset points",
            va="center",
            ha="left" if faster >= 1 else "right",
            fontsize=8,
        )
    if any(b[2] is not None for b in bars):
        axis.plot([], [], color=INK, linewidth=2.5, label="target")
        axis.legend(loc="lower right", fontsize=8)
    axis.set_yticks(places, [b[0] for b in bars], fontsize=7.5)
    axis.invert_yaxis()
    low, high = min(1, *(b[1] for b in bars)), max(1, *(max(b[1], b[2] or 0) for b in bars))
    axis.set_xlim(low / 1.6, high * 1.6)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 1.6 <= t <= high * 1.6]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    axis.grid(axis="x", which="both", color="#eeeeee")
    axis.set_axisbelow(True)


def _scaling(axis, scaling: dict[str, dict]) -> None:
    axis.set_title("Time of one forward, float32, random inputs", fontsize=11, loc="left")
    lengths = sorted({n for points in scaling.values() for n in points["lengths"]})
    if not lengths:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    styles = {
        "topk_attention": (OURS, "o-"),
        "gathered_attention": ("#e0a030", "s-"),
        "sdpa": ("#888888", "^--"),
    }
    for name, points in scaling.items():
        colour, style = styles[name]
        growth = "" if points["exponent"] is None else f": grows as T^{points['exponent']:.2f}"
        label = {"gathered_attention": "gathered_attention (indices given)"}.get(name, LABELS.get(name, name))
        axis.plot(points["lengths"], points["milliseconds"], style, color=colour, label=label + growth)
    axis.set(xscale="log", yscale="log", xlabel="sequence length T", ylabel="milliseconds")
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(color="#eeeeee")
    axis.legend(fontsize=9)


def _memory(axis, rows: list[dict]) -> None:
    axis.set_title("Peak memory beyond the inputs, outputs included", fontsize=11, loc="left")
    if not rows:
        return
    names = [f"{row['op']}\n{row['direction']}\nT={row['length']:,}" for row in rows]
    names.append(f"for comparison:\na stored score matrix\nT={rows[0]['length']:,}")
    values = [row["extra_mb"] for row in rows] + [rows[0]["score_matrix_mb"]]
    bars = axis.bar(names, values, color=[OURS] * len(rows) + [RIVAL], width=0.6)
    axis.bar_label(bars, [f"{v:,.0f} MB" for v in values], fontsize=9)
    for place, row in enumerate(rows):
        if row["target_mb"] is not None:
            axis.plot(
                [place - 0.4, place + 0.4], [row["target_mb"]] * 2, color=INK, linewidth=2.5, label="target"
            )
            axis.legend(fontsize=8)
    axis.set(yscale="log", ylabel="MB")
    axis.set_ylim(min(10, *values) / 2 if min(values) > 0 else 1, max(values) * 4)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_axisbelow(True)
