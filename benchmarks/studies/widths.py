"""Does an embedding of variable width help at equal parameters? Small causal GPTs on real text, tied heads.

    sparse-attn study widths --text FILE …    about an hour on one core; without --text the package's own addresses
    sparse-attn study widths --quick          two minutes: three arms, one seed

Arms: the full table; for 1/2, 1/4 and 1/8 of its numbers a uniform low-rank table, and planned widths within the same
number; the published recipe of three bands. All see the same tokens in the same order and start with the same body.
Each arm's learning rate is the best of one small grid by the loss on one half of the held-out windows; all losses
reported are of the other half. Differences are of the same seeds. Rows already in the results file are kept, so that an
interrupted run goes on; a run with other options needs another --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.studies import results
from benchmarks.studies.statistics import Interval, interval
from benchmarks.studies.widths_model import (
    GPT,
    WIDTH,
    Corpus,
    Shape,
    full,
    load,
    planned,
    three_bands,
    uniform,
)
from sparse_attn.bench.memory import peak_of

DECILES, WARM_UP = 10, 20


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    vocabulary: int = 8192
    context: int = 128
    batch: int = 8
    steps: int = 400
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    seeds: int = 5
    shares: tuple[int, ...] = (2, 4, 8)
    windows: int = 800  # held-out windows, half of them for the choice of the rate


QUICK = Settings(vocabulary=2048, context=64, steps=120, rates=(1e-2,), seeds=1, shares=(4,), windows=128)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_training_options(parser, Settings())
    parser.add_argument(
        "--report", action="store_true", help="train nothing: tables and picture of the runs that are there"
    )


def execute(arguments: argparse.Namespace, settings: Settings | None = None) -> int:
    settings = results.asked(arguments, settings or (QUICK if arguments.quick else Settings()))
    found = results.start("widths", arguments)
    corpus = load(arguments.text, settings.vocabulary, train=settings.context, held_out=settings.context)
    shapes = arms(corpus.counts, settings)
    results.keep_settings(found, vars(settings))
    found.about |= describe(corpus, shapes)
    if arguments.report:
        report(found, {arm: shape for arm, shape in shapes.items() if found.row(arm=arm)}, settings)
        return 0
    for name, runs in (("tuning", tuning_runs), ("seeds", main_runs)):
        keys = list(runs(found, shapes, settings))
        with results.bar(name, len(keys)) as advance:
            for arm, rate, seed in keys:
                if found.row(arm=arm, rate=rate, seed=seed) is None:
                    taken = train(corpus, shapes[arm], rate, seed, settings)
                    found.add({"arm": arm, "rate": rate, "seed": seed, **taken})
                    results.say(
                        f"{arm}, rate {rate:g}, seed {seed}: {taken['loss']:.4f} nats, {taken['seconds']:.0f} s"
                    )
                advance()
    report(found, shapes, settings)
    return 0


def report(found: results.Results, shapes: dict[str, Shape], settings: Settings) -> None:
    found.about["comparisons"] = {
        f"{one} − {other}": asdict(difference(found, one, other, settings)) for one, other in pairs(shapes)
    }
    found.save()
    show(found, shapes, settings)
    draw(found, shapes, settings)
    found.wrote()


def arms(counts: Tensor, settings: Settings) -> dict[str, Shape]:
    shapes = {"full table": full(counts)}
    for share in settings.shares:
        shapes[f"uniform 1/{share}"] = uniform(counts, len(counts) * WIDTH // share)
        # Within what the uniform table really takes: it has whole widths alone to choose from.
        shapes[f"planned 1/{share}"] = planned(counts, shapes[f"uniform 1/{share}"].parameters())
    shapes["three bands"] = three_bands(counts)
    return shapes


def describe(corpus: Corpus, shapes: dict[str, Shape]) -> dict:
    return {
        "text": {
            "documents": corpus.documents,
            "characters": corpus.characters,
            "train_tokens": len(corpus.train),
            "held_out_tokens": len(corpus.held_out),
            "vocabulary": len(corpus.counts),
        },
        "arms": {
            name: {"widths": list(s.widths), "tokens": s.band_sizes, "parameters": s.parameters()}
            for name, s in shapes.items()
        },
    }


def tuning_runs(found: results.Results, shapes: dict[str, Shape], settings: Settings):
    """(arm, rate, seed) of the grid, with the first seed."""
    return ((arm, rate, 0) for arm in shapes for rate in settings.rates)


def main_runs(found: results.Results, shapes: dict[str, Shape], settings: Settings):
    """The other seeds at the rate that is best for the arm: seed by seed, so that a part of them is of use."""
    return ((arm, best_rate(found, arm), seed) for seed in range(1, settings.seeds) for arm in shapes)


def best_rate(found: results.Results, arm: str) -> float:
    return min(found.having(arm=arm, seed=0), key=lambda r: r["tuning_loss"])["rate"]


def train(corpus: Corpus, shape: Shape, rate: float, seed: int, settings: Settings) -> dict:
    """One run: losses on both halves of the held-out windows, by decile, and what it took."""
    began = time.perf_counter()
    model = GPT(shape, settings.context, seed)
    optimizers = model.optimizers(rate)
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    order = torch.Generator().manual_seed(seed)
    starts = torch.randint(
        len(corpus.train) - settings.context, (settings.steps, settings.batch), generator=order
    )

    def step(i: int) -> float:
        factor = min(1.0, (i + 1) / WARM_UP) * (1.0 - 0.9 * i / settings.steps)
        for optimizer, full_rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = full_rate * factor
        start = time.perf_counter()
        loss = model.loss(windows(corpus.train, starts[i], settings.context))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return time.perf_counter() - start

    step(0)  # makes the optimizers' state, which the peak of a step is not to hold
    _, peak = peak_of(lambda: step(1))
    seconds = [step(i) for i in range(2, settings.steps)]
    tuning, losses, targets = held_out_losses(model, corpus, settings)
    tenth = deciles(corpus.counts)[targets]
    return {
        "loss": float(losses.mean()),
        "tuning_loss": tuning,
        "deciles": [float(losses[tenth == d].mean()) for d in range(DECILES)],
        "step_ms": 1e3
        * statistics.quantiles(seconds, n=10)[0],  # undisturbed steps: the machine is not always idle
        "step_peak_mb": peak / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
    }


def windows(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """int64 [len(starts), context + 1]."""
    return tokens[starts[:, None] + torch.arange(context + 1)]


@torch.no_grad()
def held_out_losses(model: GPT, corpus: Corpus, settings: Settings) -> tuple[float, Tensor, Tensor]:
    """(mean loss of the even windows, losses of the odd ones, their targets): windows spread over the held-out text."""
    last = len(corpus.held_out) - settings.context - 1
    starts = torch.linspace(0, last, settings.windows).long()
    losses, targets = ([], []), ([], [])
    for half in (0, 1):
        for some in starts[half::2].split(settings.batch):
            chosen = windows(corpus.held_out, some, settings.context)
            losses[half].append(model.loss(chosen, reduction="none").flatten())
            targets[half].append(chosen[:, 1:].flatten())
    return float(torch.cat(losses[0]).mean()), torch.cat(losses[1]), torch.cat(targets[1])


def deciles(counts: Tensor) -> Tensor:
    """0 for the tokens that make up the most frequent tenth of all occurrences, … 9 for the rarest: int64 [V]."""
    order = counts.argsort(descending=True, stable=True)
    middle = counts[order].cumsum(0).double() - counts[order].double() / 2
    found = torch.empty_like(counts)
    found[order] = (middle * DECILES / counts.sum()).long().clamp(max=DECILES - 1)
    return found


# --- what it says --------------------------------------------------------------------------------------------------


def pairs(shapes: dict[str, Shape]) -> list[tuple[str, str]]:
    """The comparisons: planned against uniform of the same size, and all against the full table."""
    planned_arms = [name for name in shapes if name.startswith("planned")]
    same_size = [(name, name.replace("planned", "uniform")) for name in planned_arms]
    return same_size + [(name, "full table") for name in shapes if name != "full table"]


def of_seeds(found: results.Results, arm: str, settings: Settings) -> dict[int, dict]:
    """The arm's rows at its best rate, by seed."""
    rows = found.having(arm=arm, rate=best_rate(found, arm))
    return {r["seed"]: r for r in rows if r["seed"] < settings.seeds}


def difference(found: results.Results, one: str, other: str, settings: Settings) -> Interval:
    first, second = of_seeds(found, one, settings), of_seeds(found, other, settings)
    return interval([first[s]["loss"] - second[s]["loss"] for s in first if s in second])


def show(found: results.Results, shapes: dict[str, Shape], settings: Settings) -> None:
    table, tenths = [], []
    for arm, shape in shapes.items():
        rows = list(of_seeds(found, arm, settings).values())
        table.append(
            [
                arm,
                f"{shape.parameters():,}",
                "/".join(map(str, shape.widths)),
                f"{best_rate(found, arm):g}",
                str(len(rows)),
                str(interval([r["loss"] for r in rows])),
                f"{statistics.median(r['step_ms'] for r in rows):.0f}",
                f"{statistics.median(r['step_peak_mb'] for r in rows):.0f}",
            ]
        )
        means = [sum(r["deciles"][d] for r in rows) / len(rows) for d in range(DECILES)]
        tenths.append([arm, *(f"{m:.2f}" for m in means)])
    text = found.about["text"]
    results.show(
        f"Held-out loss, {text['vocabulary']:,} byte-pair tokens, model width {WIDTH}, "
        f"{settings.steps * settings.batch * settings.context:,} tokens seen",
        ["table", "numbers in it", "widths", "rate", "seeds", "nats per token [95 %]", "step ms", "step MB"],
        table,
    )
    results.show(
        "By decile of token frequency (1: the most frequent)",
        ["table", *map(str, range(1, DECILES + 1))],
        tenths,
    )
    compared = []
    for one, other in pairs(shapes):
        gap = difference(found, one, other, settings)
        verdict = "one run" if gap.p is None else "significant" if gap.p < 0.05 else "not significant"
        compared.append([f"{one} − {other}", str(gap), "" if gap.p is None else f"{gap.p:.2g}", verdict])
    results.show(
        "Differences between the same seeds (below 0: the first is better)",
        ["comparison", "nats", "p", ""],
        compared,
    )


def draw(found: results.Results, shapes: dict[str, Shape], settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 6.5), layout="constrained")
    families = {
        "uniform low rank": [a for a in shapes if a.startswith("uniform")],
        "planned widths": [a for a in shapes if a.startswith("planned")],
        "full table": ["full table"],
        "published three bands": ["three bands"],
    }
    for i, (label, arms_of_it) in enumerate(families.items()):
        members = [a for a in arms_of_it if a in shapes]
        sizes = [shapes[a].parameters() for a in members]
        gaps = [interval([r["loss"] for r in of_seeds(found, a, settings).values()]) for a in members]
        error = [[g.mean - (g.low or g.mean) for g in gaps], [(g.high or g.mean) - g.mean for g in gaps]]
        left.errorbar(
            sizes, [g.mean for g in gaps], yerr=error, marker="o", capsize=4, color=f"C{i}", label=label
        )
    left.set(
        xscale="log",
        xlabel="numbers in the embedding, shared with the head",
        ylabel="held-out loss (nats per token)",
        title="Lower is better; bars: 95 % over seeds",
    )
    left.legend()
    left.grid(alpha=0.3)
    for one, other in pairs(shapes):
        if other == "full table":
            continue
        first, second = of_seeds(found, one, settings), of_seeds(found, other, settings)
        seeds = [s for s in first if s in second]
        gaps = [
            interval([first[s]["deciles"][d] - second[s]["deciles"][d] for s in seeds])
            for d in range(DECILES)
        ]
        error = [[g.mean - (g.low or g.mean) for g in gaps], [(g.high or g.mean) - g.mean for g in gaps]]
        places = range(1, DECILES + 1)
        right.errorbar(
            places, [g.mean for g in gaps], yerr=error, marker="o", capsize=3, label=f"{one} − {other}"
        )
    right.axhline(0, color="black", linewidth=1)
    right.set(
        xlabel="decile of token frequency (1: the most frequent, 10: the rarest)",
        ylabel="difference of loss (nats)",
        title="Planned widths against uniform ones of the same size (below 0: planned is better)",
    )
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
