"""The picture of a plan: the width of each token's row over its rank, above how often the tokens occur."""

from __future__ import annotations

from pathlib import Path

import numpy

from sparse_attn.planner import WidthPlan

# Okabe-Ito: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(path: Path, plan: WidthPlan, counts: numpy.ndarray, name: str) -> None:
    """Writes the PNG; `counts` [V] in id order."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed, whatever the user's settings
    from matplotlib import pyplot

    bands = plan.token_band.numpy()
    # Ties as the planner breaks them: within a band by frequency, the bands in their order.
    order = numpy.lexsort((-counts, bands))
    ranks = numpy.arange(1, len(order) + 1)
    widths = numpy.array(plan.widths)[bands[order]]
    shares = numpy.bincount(bands, weights=counts, minlength=plan.num_bands) / max(counts.sum(), 1e-300)
    with pyplot.rc_context({"font.size": 11}):
        figure, (top, bottom) = pyplot.subplots(
            2, 1, figsize=(10, 7.5), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        top.set_xscale("log")
        start = 0
        for band, (size, width) in enumerate(zip(plan.band_sizes, plan.widths, strict=True)):
            if size == 0:
                continue
            color = COLORS[band % len(COLORS)]
            span = (start + 0.7 if start == 0 else start + 0.5, start + size + 0.5)
            label = f"band {band}: {size:,} tokens × {width}, {shares[band]:.1%} of occurrences"
            top.fill_between(span, width, color=color, alpha=0.55, lw=0, label=label)
            bottom.axvspan(*span, color=color, alpha=0.15, lw=0)
            start += size
        top.step(ranks, widths, where="mid", color="black", lw=1.2)
        top.set_ylim(0, plan.embedding_dim * 1.06)
        top.axhline(plan.embedding_dim, color="grey", lw=0.8, ls=":")
        top.set_ylabel("width of the embedding row")
        top.legend(frameon=True, loc="lower left", framealpha=0.9)
        top.set_title(
            f"{plan.num_embeddings:,} tokens of {name}: {plan.num_parameters():,} parameters, "
            f"{plan.compression:.2f}× smaller than the full table"
        )
        seen = counts[order] > 0
        bottom.plot(ranks[seen], counts[order][seen], color="black", lw=1.2)
        if seen.any():
            bottom.set_yscale("log")
        never = int((~seen).sum())
        bottom.set_ylabel("occurrences")
        bottom.set_xlabel(
            "rank of the token by frequency" + (f" ({never:,} tokens never occur)" if never else "")
        )
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
