"""The demo's picture: loss curves, timing curves, and which keys were chosen for a sentence."""

from __future__ import annotations

import warnings
from pathlib import Path

from sparse_attn.demo.keys import ChosenKeys
from sparse_attn.demo.timing import CONTENDERS, HEAD_DIM, HEADS, Timing
from sparse_attn.demo.train import Arm

# Okabe-Ito: told apart by colour-blind readers too.
COLORS = {
    "dense": "#0072B2",
    "SDPA": "#0072B2",
    "top-k": "#D55E00",
    "plain PyTorch": "#009E73",
    "top-k + widths": "#CC79A7",
}
FUTURE = "#d9d9d9"
MARKERS = {"SDPA": "o", "top-k": "s", "plain PyTorch": "^"}


def draw(path: Path, text_name: str, arms: list[Arm], timing: Timing | None, keys: ChosenKeys | None) -> None:
    """Writes the PNG; a panel whose numbers are not there says so."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed, whatever the user's settings
    from matplotlib import pyplot

    with warnings.catch_warnings(), pyplot.rc_context({"font.size": 11, "axes.titlesize": 12.5}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a text in any script may come
        figure = pyplot.figure(figsize=(15, 11.5), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.05))
        _loss(figure.add_subplot(grid[0, 0]), text_name, arms)
        _timing(figure.add_subplot(grid[0, 1]), timing)
        _keys(figure, figure.add_subplot(grid[1, :]), keys)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _missing(axes, what: str) -> None:
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, f"{what}:\nnot measured in this run", ha="center", va="center", transform=axes.transAxes
    )


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run: one batch's loss is noisy."""
    span = max(1, len(values) // 20)
    recent = [values[max(0, i + 1 - span) : i + 1] for i in range(len(values))]
    return [sum(few) / len(few) for few in recent]


def _loss(axes, text_name: str, arms: list[Arm]) -> None:
    trained = [arm for arm in arms if arm.train_loss]
    if not trained:
        _missing(axes, "Loss")
        return
    for arm in trained:
        color = COLORS[arm.name]
        label = arm.name if arm.top_k is None else f"{arm.name} ({arm.top_k} keys per query)"
        steps = range(1, len(arm.train_loss) + 1)
        axes.plot(
            steps,
            _smooth(arm.train_loss),
            color=color,
            alpha=0.45,
            lw=1.5,
            label=f"{label}: training, running mean",
        )
        if arm.validation:
            x, y = zip(*arm.validation, strict=True)
            marker = "o" if arm.top_k is None else "s" if arm.plan is None else "D"
            axes.plot(
                x,
                y,
                color=color,
                marker=marker,
                lw=2,
                label=f"{label}: held-out, {y[-1]:.3f} at step {x[-1]}",
            )
    title = f"A small GPT learns to spell: same seed, same data order\n({text_name})"
    axes.set_title(title, parse_math=False)  # a file name may hold dollar signs
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per character; lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _timing(axes, timing: Timing | None) -> None:
    if timing is None or not any(value for row in timing.seconds.values() for value in row.values()):
        _missing(axes, "Attention time")
        return
    from matplotlib.ticker import FuncFormatter, LogLocator

    for name in CONTENDERS:
        points = [(length, row[name] * 1e3) for length, row in timing.seconds.items() if row[name]]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        label = {
            "SDPA": "dense: F.scaled_dot_product_attention",
            "plain PyTorch": "top-k in plain PyTorch (topk + gather)",
        }
        axes.loglog(
            x,
            y,
            color=COLORS[name],
            marker=MARKERS[name],
            lw=2,
            label=label.get(name, f"top-k: sparse_attn ({timing.wing} wing)"),
        )
        axes.annotate(
            f"{_short(y[-1])} ms", (x[-1], y[-1]), xytext=(7, 0), textcoords="offset points", va="center"
        )
    lengths = list(timing.seconds)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: _short(value)))
    axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 1.45)
    axes.set_title(
        f"Time of one causal attention, forward\n({HEADS} heads of {HEAD_DIM}, float32, {timing.top_k} keys per query)"
    )
    axes.set_xlabel("sequence length T (tokens)")
    axes.set_ylabel("milliseconds (lower is better)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="lower right")


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _visible(character: str) -> str:
    return {" ": "␣", "\n": "↵", "\t": "⇥"}.get(character, character)


def _keys(figure, axes, keys: ChosenKeys | None) -> None:
    if keys is None:
        _missing(axes, "Chosen keys")
        return
    import numpy
    from matplotlib import colors
    from matplotlib.patches import Patch

    weights = numpy.array([[numpy.nan if w is None else w for w in row] for row in keys.weights])
    queries, shown = weights.shape
    hidden = numpy.arange(shown) > numpy.arange(shown - queries, shown)[:, None]
    axes.imshow(
        numpy.where(hidden, 1.0, numpy.nan),
        cmap=colors.ListedColormap([FUTURE]),
        aspect="auto",
        interpolation="none",
    )
    image = axes.imshow(
        weights,
        norm=colors.LogNorm(1e-3, 1, clip=True),
        cmap="YlOrRd",
        aspect="auto",
        interpolation="none",
    )
    axes.set_xticks(range(shown), map(_visible, keys.text), family="DejaVu Sans Mono", fontsize=9.5)
    axes.set_yticks(range(queries), map(_visible, keys.queries), family="DejaVu Sans Mono", fontsize=9.5)
    axes.tick_params(length=0)
    axes.set_xticks(numpy.arange(shown + 1) - 0.5, minor=True)
    axes.set_yticks(numpy.arange(queries + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e8e8e8", lw=0.4)
    axes.tick_params(which="minor", length=0)
    notes = [f"the latest {keys.window} are always kept"] if keys.window else []
    notes += [f"{keys.outside:.0%} of the weight lies further left"] if keys.context > shown else []
    axes.set_title(
        f"Which of {keys.context} keys the top-k model chose for the last {queries} characters of a held-out sentence\n"
        f"(layer {keys.layer + 1}, head {keys.head + 1}, the one that looks furthest back; "
        f"{keys.top_k} keys per query{''.join(f'; {note}' for note in notes)})"
    )
    axes.legend(
        handles=[
            Patch(facecolor="#f03b20", label="chosen (colour: attention weight)"),
            Patch(facecolor="white", edgecolor="#999999", label="seen, not chosen"),
            Patch(facecolor=FUTURE, label="the future, never seen"),
        ],
        loc="upper right",
        framealpha=1,
    )
    axes.set_xlabel("key (each column is a character of the text)")
    axes.set_ylabel("query (read downwards)")
    figure.colorbar(image, ax=axes, pad=0.01, label="attention weight", fraction=0.03)
