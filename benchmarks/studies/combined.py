"""Do the two ideas add up? Causal GPTs from scratch on real text: top-k attention, planned widths, both, neither.

    sparse-attn study combined --text FILE …    half an hour on one core; without --text the package's own addresses
    sparse-attn study combined --quick          two minutes: short windows, one seed

First a training step of each model is timed, all in turns, and its peak memory taken: is the speed-up of both the
product of the two? Then all train for equally many steps on the same windows in the same order: is the loss of both the
sum? Rows already in the results file are kept, so that an interrupted run goes on; a run with other options needs
another --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

from benchmarks.studies import results
from benchmarks.studies.attention import DENSE, Training
from benchmarks.studies.statistics import Interval, interval
from benchmarks.studies.widths_model import WIDTH, Corpus, full, load, planned
from sparse_attn.bench.memory import peak_of

NEITHER, SPARSE, NARROW, BOTH = ARMS = ("neither", "top-k", "planned widths", "both")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    vocabulary: int = 8192
    budget: int = 64  # keys of a query, the selection for each head
    share: int = 4  # of the full table's numbers, one in
    lengths: tuple[int, ...] = (512, 2048, 8192)  # of the timed steps
    rounds: int = 8
    length: int = 2048  # of the models that are trained
    tokens: int = 4096  # of a step, or one window if that is longer
    steps: int = 200
    rate: float = 3e-2  # the best for the full table and for planned widths in the widths study
    seeds: int = 5
    held_out: int = 65536  # tokens


QUICK = Settings(
    vocabulary=2048,
    budget=16,
    lengths=(256, 1024),
    length=256,
    tokens=1024,
    steps=60,
    rate=1e-2,
    seeds=1,
    held_out=16384,
)


def training(arm: str, corpus: Corpus, length: int, seed: int, steps: int, settings: Settings) -> Training:
    table = full(corpus.counts)
    if arm in (NARROW, BOTH):
        table = planned(corpus.counts, len(corpus.counts) * WIDTH // settings.share)
    return Training(
        f"top-k {settings.budget}" if arm in (SPARSE, BOTH) else DENSE,
        corpus,
        length,
        seed=seed,
        steps=steps,
        tokens=max(settings.tokens, length),
        rate=settings.rate,
        shape=table,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_training_options(parser, Settings())


def execute(arguments: argparse.Namespace, settings: Settings | None = None) -> int:
    settings = results.asked(arguments, settings or (QUICK if arguments.quick else Settings()))
    found = results.start("combined", arguments)
    longest = max(*settings.lengths, settings.length)
    corpus = load(arguments.text, settings.vocabulary, train=longest, held_out=settings.length)
    results.keep_settings(found, asdict(settings))
    keys = [(seed, arm) for seed in range(settings.seeds) for arm in ARMS]
    with results.bar("timings and runs", len(settings.lengths) + len(keys)) as advance:
        for length in settings.lengths:
            if not found.having(test="step", length=length):
                for row in timed(corpus, length, settings):
                    found.add(row)
            advance()
        for seed, arm in keys:
            if found.row(test="loss", arm=arm, seed=seed) is None:
                found.add(trained(corpus, arm, seed, settings))
                last = found.rows[-1]
                results.say(f"{arm}, seed {seed}: {last['loss']:.4f} nats, {last['seconds']:.0f} s")
            advance()
    show(found, settings)
    draw(found, settings)
    found.wrote()
    return 0


def timed(corpus: Corpus, length: int, settings: Settings) -> list[dict]:
    """Rows of all arms: milliseconds of one step in each round, in turns, and the peak of a step."""
    models = {arm: training(arm, corpus, length, 0, settings.rounds + 2, settings) for arm in ARMS}
    peaks = {}
    for arm, model in models.items():
        model.step(0)  # makes the optimizers' state, which the peak of a step is not to hold
        peaks[arm] = peak_of(lambda model=model: model.step(1))[1]
    seconds = [[model.step(2 + i) for model in models.values()] for i in range(settings.rounds)]
    return [
        {
            "test": "step",
            "arm": arm,
            "length": length,
            "step_ms": [1e3 * s for s in taken],
            "step_peak_mb": peaks[arm] / 1e6,
            "parameters": sum(p.numel() for p in models[arm].model.parameters()),
            "table": sum(p.numel() for p in models[arm].model.vocabulary.parameters()),
        }
        for arm, taken in zip(models, zip(*seconds, strict=True), strict=True)
    ]


def trained(corpus: Corpus, arm: str, seed: int, settings: Settings) -> dict:
    began = time.perf_counter()
    model = training(arm, corpus, settings.length, seed, settings.steps, settings)
    for i in range(settings.steps):
        model.step(i)
    loss = statistics.mean(model.held_out_losses(settings.held_out))
    return {
        "test": "loss",
        "arm": arm,
        "seed": seed,
        "loss": loss,
        "seconds": time.perf_counter() - began,
    }


# --- what it says --------------------------------------------------------------------------------------------------


def speed_ups(found: results.Results, arm: str, length: int) -> list[float]:
    """Of each round: time of the model with neither over that of `arm`."""
    plain = found.row(test="step", arm=NEITHER, length=length)["step_ms"]
    taken = found.row(test="step", arm=arm, length=length)["step_ms"]
    return [p / t for p, t in zip(plain, taken, strict=True)]


def over_product(found: results.Results, length: int) -> Interval:
    """The speed-up of both over the product of the two, round by round."""
    three = (speed_ups(found, arm, length) for arm in (SPARSE, NARROW, BOTH))
    return interval([both / (sparse * narrow) for sparse, narrow, both in zip(*three, strict=True)])


def losses(found: results.Results, arm: str, settings: Settings) -> list[float]:
    return [found.row(test="loss", arm=arm, seed=seed)["loss"] for seed in range(settings.seeds)]


def gaps(found: results.Results, arm: str, settings: Settings) -> list[float]:
    """Loss over that of the model with neither, by seed."""
    pairs = zip(losses(found, arm, settings), losses(found, NEITHER, settings), strict=True)
    return [one - plain for one, plain in pairs]


def over_sum(found: results.Results, settings: Settings) -> Interval:
    """What both lose beyond the sum of what each loses, by seed."""
    three = (gaps(found, arm, settings) for arm in (SPARSE, NARROW, BOTH))
    return interval([both - sparse - narrow for sparse, narrow, both in zip(*three, strict=True)])


def show(found: results.Results, settings: Settings) -> None:
    for length in settings.lengths:
        table = []
        for arm in ARMS:
            row = found.row(test="step", arm=arm, length=length)
            table.append(
                [
                    arm,
                    f"{row['table']:,}",
                    f"{row['parameters']:,}",
                    f"{statistics.median(row['step_ms']):.0f}",
                    f"{statistics.median(speed_ups(found, arm, length)):.2f}×",
                    f"{row['step_peak_mb']:.0f}",
                ]
            )
        tokens = max(settings.tokens, length)
        results.show(
            f"A training step of {tokens:,} tokens in windows of {length:,}, {settings.budget} keys, "
            f"1/{settings.share} of the table (medians of {settings.rounds} rounds)",
            ["model", "numbers in the table", "in the model", "step ms", "as fast", "step MB"],
            table,
        )
    table = []
    for length in settings.lengths:
        one, other, both = (
            statistics.median(speed_ups(found, arm, length)) for arm in (SPARSE, NARROW, BOTH)
        )
        added = 1 / (1 / one + 1 / other - 1)
        cells = [f"{length:,}", *(f"{x:.2f}×" for x in (one, other, one * other, added, both))]
        table.append([*cells, str(over_product(found, length))])
    results.show(
        "Is the speed-up of both the product of the two?",
        ["T", "top-k", "widths", "product", "savings added", "both", "both / product [95 % over rounds]"],
        table,
    )
    table = []
    for arm in ARMS:
        gap = interval(gaps(found, arm, settings))
        table.append(
            [arm, str(interval(losses(found, arm, settings))), "" if arm == NEITHER else str(gap), _p(gap)]
        )
    extra = over_sum(found, settings)
    table.append(["both beyond the sum of the two", "", str(extra), _p(extra)])
    results.show(
        f"Held-out loss after {settings.steps} steps of {settings.tokens:,} tokens, windows of {settings.length:,}, "
        f"{settings.seeds} seeds",
        ["model", "nats per token [95 %]", "over neither [95 %]", "p"],
        table,
    )


def _p(gap: Interval) -> str:
    return "" if gap.p is None or gap.p != gap.p else f"{gap.p:.2g}"


def draw(found: results.Results, settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    places = range(len(settings.lengths))
    medians = {
        arm: [statistics.median(speed_ups(found, arm, length)) for length in settings.lengths] for arm in ARMS
    }
    for i, arm in enumerate(ARMS[1:]):
        left.bar([p + 0.27 * (i - 1) for p in places], medians[arm], 0.25, color=f"C{i}", label=arm)
    products = [a * b for a, b in zip(medians[SPARSE], medians[NARROW], strict=True)]
    left.hlines(
        products,
        [p + 0.15 for p in places],
        [p + 0.39 for p in places],
        color="black",
        label="product of the two",
    )
    left.axhline(1, color="black", linewidth=1)
    left.set_xticks(places, [f"T = {length:,}" for length in settings.lengths])
    left.set(ylabel="training steps per second, over those of neither", title="Speed: higher is better")
    found_gaps = [interval(gaps(found, arm, settings)) for arm in ARMS[1:]]
    error = [
        [g.mean - (g.mean if g.low is None else g.low) for g in found_gaps],
        [(g.mean if g.high is None else g.high) - g.mean for g in found_gaps],
    ]
    means = [g.mean for g in found_gaps]
    right.bar(ARMS[1:], means, 0.6, yerr=error, capsize=5, color=["C0", "C1", "C2"])
    right.hlines(means[0] + means[1], 1.75, 2.25, color="black", label="sum of the two")
    right.axhline(0, color="black", linewidth=1)
    right.set(
        ylabel="held-out loss over that of neither (nats)",
        title=f"Loss after equal steps, T = {settings.length:,}: lower is better; bars: 95 % over seeds",
    )
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
