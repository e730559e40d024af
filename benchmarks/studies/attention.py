"""Is sparse attention worth training with? Causal GPTs from scratch on real text: dense, exact top-k, an indexer.

    sparse-attn study attention --text FILE …    hours on one core; without --text the package's own addresses
    sparse-attn study attention --quick          two minutes: short windows, one seed
    sparse-attn study attention --arms "annealed 16" --lengths 2048 --rules "equal time" …    one piece of it

Every arm sees the same windows in the same order and starts from the same numbers. Once all arms train for equally many
steps; once for as many as fit into the time of the dense arm's, by step times measured in turns beforehand. The indexer
arm attends densely for its first fifth, while its indexers learn the attention over all keys, then to what they select.
Beside the smallest budget stand models that do not forget at once what they leave out: with means of it ("+ mean", "+
blocks": the tails of `topk_attention`), and with a budget that falls from an eighth of the window in the first half.
With --threads 1 all seconds, of a step and of a whole run's steps, are processor time: what else the machine does
counts for little.

The learning rate is the dense arm's best of a small grid by the loss on one half of the held-out windows, at each
length; all losses reported are of the other half. Rows already in the results file are kept, so that an interrupted run
goes on; a run with other options needs another --out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.studies import results
from benchmarks.studies.cost import clock
from benchmarks.studies.statistics import interval
from benchmarks.studies.widths_model import GPT, WIDTH, Corpus, Shape, full, load
from sparse_attn import gathered_attention, topk_attention
from sparse_attn.cli.console import UsageError, count
from sparse_attn.demo.model import HEADS
from sparse_attn.nn import Indexer, TopKAttention

DENSE, STEPS, TIME, TUNING = "dense", "equal steps", "equal time", "tuning"
RULES = (STEPS, TIME)
WARM_UP, DENSE_SHARE, TIMED_STEPS = 20, 0.2, 12
ANNEALED_SHARE, ANNEALED_FROM = 0.5, 8  # of the steps, in which a budget falls from this part of the window
TAILS = ("mean", "blocks")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    vocabulary: int = 8192
    lengths: tuple[int, ...] = (512, 2048)
    budgets: tuple[int, ...] = (16, 64)
    tokens: int = 4096  # of a step
    steps: int = 200  # of the dense arm
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    seeds: int = 3
    held_out: int = 65536  # tokens


QUICK = Settings(
    vocabulary=2048,
    lengths=(256,),
    budgets=(16,),
    tokens=1024,
    steps=60,
    rates=(1e-2,),
    seeds=1,
    held_out=16384,
)


class IndexedAttention(TopKAttention):
    """Attention to the keys that an indexer selects, the indexer trained beside it.

    `indexer_loss` is that of the last forward pass in training: the divergence from this layer's attention, over all
    keys while `top_k` is None, then over those that are selected.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads, None)
        self.indexer = Indexer(embed_dim)
        self.indexer_loss: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split_heads(self.qkv(hidden))
        frozen = hidden.detach()
        indices = None if self.top_k is None else self.indexer.select(frozen, self.top_k)
        if self.training:
            self.indexer_loss = self.indexer.loss(frozen, query.detach(), key.detach(), indices=indices)
        if indices is None:
            attended = self.attend(query, key, value)
        else:
            attended = gathered_attention(query, key, value, indices)
        return self.out(attended.transpose(1, 2).flatten(2))


class TailedAttention(TopKAttention):
    """Attention to the best keys in which the others count by means (`tail` of topk_attention)."""

    def __init__(self, embed_dim: int, num_heads: int, top_k: int, tail: str) -> None:
        super().__init__(embed_dim, num_heads, top_k)
        self.tail = tail

    def attend(self, query: Tensor, key: Tensor, value: Tensor, selector=None) -> Tensor:
        return topk_attention(query, key, value, self.top_k, is_causal=True, tail=self.tail)


def build(arm: str, shape: Shape, length: int, seed: int) -> GPT:
    """`arm` is "dense", "top-k K", "top-k K + TAIL", "annealed K" or "indexer K"; `shape` is that of the embedding."""
    model = GPT(shape, length, seed)
    if arm == DENSE:
        return model
    tail = arm.partition(" + ")[2]
    for block in model.blocks:
        if arm.startswith("indexer") or tail:
            attention = (
                TailedAttention(WIDTH, HEADS, budget_of(arm), tail)
                if tail
                else IndexedAttention(WIDTH, HEADS)
            )
            attention.load_state_dict(block.attention.state_dict(), strict=False)
            block.attention = attention
        else:
            block.attention.top_k = budget_of(arm)
    return model


def budget_of(arm: str) -> int:
    return int(arm.split()[1])


def annealed(budget: int, length: int, progress: float) -> int:
    """The budget at a part of the training, from 0 to 1: it falls by equal factors, then stays."""
    above = max(1.0, length / ANNEALED_FROM / budget)
    return round(budget * above ** max(0.0, 1.0 - progress / ANNEALED_SHARE))


def arms(settings: Settings) -> list[str]:
    sparse = [f"top-k {k}" for k in settings.budgets] + [f"indexer {max(settings.budgets)}"]
    return [DENSE, *sparse, *remembering(settings)]


def remembering(settings: Settings) -> list[str]:
    """Those that beside plain top-k of the same budget keep something of what it leaves out."""
    budget = min(settings.budgets)
    return [*(f"top-k {budget} + {tail}" for tail in TAILS), f"annealed {budget}"]


def plain(arm: str) -> str:
    return f"top-k {budget_of(arm)}"


def moments(arm: str) -> list[tuple[float, float]]:
    """(part of the training, share of it) at which its steps take different times."""
    if arm.startswith("indexer"):
        return [(0.0, DENSE_SHARE), (0.99, 1 - DENSE_SHARE)]
    if arm.startswith("annealed"):
        middles = [ANNEALED_SHARE * (i + 0.5) / 4 for i in range(4)]
        return [*((m, ANNEALED_SHARE / 4) for m in middles), (0.99, 1 - ANNEALED_SHARE)]
    return [(0.99, 1.0)]


class Training:
    """One model on its way: `step` is one update."""

    def __init__(
        self,
        arm: str,
        corpus: Corpus,
        length: int,
        *,
        seed: int,
        steps: int,
        tokens: int,
        rate: float,
        shape: Shape | None = None,
    ) -> None:
        """`tokens` of a step; without a `shape` the embedding is a full table."""
        self.arm, self.corpus, self.length, self.steps = arm, corpus, length, steps
        self.model = build(arm, shape or full(corpus.counts), length, seed).train()
        indexers = {id(p) for m in self.model.modules() if isinstance(m, Indexer) for p in m.parameters()}
        self.optimizers = [
            torch.optim.Muon(
                [p for p in self.model.blocks.parameters() if p.dim() == 2 and id(p) not in indexers],
                lr=0.02,
                weight_decay=0.0,
            ),
            torch.optim.AdamW(
                [p for n, p in self.model.named_parameters() if not (n.startswith("blocks") and p.dim() == 2)]
                + [p for p in self.model.parameters() if id(p) in indexers and p.dim() == 2],
                lr=rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            ),
        ]
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        order = torch.Generator().manual_seed(seed)
        # All windows of the longest run: a longer run goes on where a shorter one ends.
        self.starts = torch.randint(len(corpus.train) - length, (steps, tokens // length), generator=order)

    def step(self, i: int) -> float:
        """Update i; its seconds."""
        for layer in self.indexed():
            dense = i < DENSE_SHARE * self.steps
            layer.top_k = None if dense else budget_of(self.arm)
        if self.arm.startswith("annealed"):
            for block in self.model.blocks:
                block.attention.top_k = annealed(budget_of(self.arm), self.length, i / self.steps)
        factor = min(1.0, (i + 1) / WARM_UP) * (1.0 - 0.9 * i / self.steps)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        start = clock()
        loss = self.model.loss(windows(self.corpus.train, self.starts[i], self.length))
        for layer in self.indexed():
            loss = loss + layer.indexer_loss
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return clock() - start

    def indexed(self) -> list[IndexedAttention]:
        return [b.attention for b in self.model.blocks if isinstance(b.attention, IndexedAttention)]

    @torch.no_grad()
    def held_out_losses(self, tokens: int) -> tuple[float, float]:
        """Nats per token over windows spread over the held-out text: (of the even windows, of the odd ones)."""
        self.model.eval()
        count = max(2, tokens // self.length)
        starts = torch.linspace(0, len(self.corpus.held_out) - self.length - 1, count).long()
        losses = [self.model.loss(windows(self.corpus.held_out, s, self.length)) for s in starts.split(1)]
        self.model.train()
        return float(torch.stack(losses[0::2]).mean()), float(torch.stack(losses[1::2]).mean())


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """int64 [len(starts), length + 1]."""
    return tokens[starts[:, None] + torch.arange(length + 1)]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_training_options(parser, Settings())
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help=f"default: all ({', '.join(arms(Settings()))})"
    )
    parser.add_argument(
        "--lengths", type=count(1), nargs="+", metavar="T", help="of the windows (default: all)"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="default: both")


def execute(arguments: argparse.Namespace, settings: Settings | None = None) -> int:
    settings = results.asked(arguments, settings or (QUICK if arguments.quick else Settings()))
    for name, known in (("arms", arms(settings)), ("lengths", settings.lengths)):
        for value in getattr(arguments, name) or ():
            if value not in known:
                raise UsageError(f"--{name} must be among {', '.join(map(str, known))}, got {value}")
    found = results.start("attention", arguments)
    longest = max(settings.lengths)
    corpus = load(arguments.text, settings.vocabulary, train=longest, held_out=longest)
    results.keep_settings(found, asdict(settings))
    found.about["tokens"] = {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    step_ms = found.about.setdefault("step_ms", {})
    runs = [key for key in all_runs(settings) if wanted(key, arguments)]
    with results.bar("runs", len(runs)) as advance:
        for key in runs:
            if found.row(**key) is None:
                times = step_ms.setdefault(str(key["length"]), {})
                asked = [arm for arm in arms(settings) if arm in (DENSE, *(arguments.arms or arms(settings)))]
                lacking = [arm for arm in asked if arm not in times]
                if lacking:
                    add_step_times(times, lacking, corpus, key["length"], settings)
                    found.save()
                found.add({**key, **run(found, corpus, settings, **key)})
                last = found.rows[-1]
                results.say(
                    f"T={last['length']} {last['arm']}, {last['rule']}, seed {last['seed']}: "
                    f"{last['loss']:.4f} nats, {last['steps']} steps, {last['seconds']:.0f} s"
                )
            advance()
    show(found, settings)
    draw(found, settings)
    found.wrote()
    return 0


def all_runs(settings: Settings) -> Iterator[dict]:
    """The keys of all rows: seed by seed, so that a part of them is of use."""
    for length in settings.lengths:
        for rate in settings.rates:
            yield {"arm": DENSE, "length": length, "rule": TUNING, "seed": 0, "rate": rate}
    for seed in range(settings.seeds):
        for length in settings.lengths:
            for arm in arms(settings):
                for rule in (STEPS,) if arm == DENSE else (STEPS, TIME):
                    yield {"arm": arm, "length": length, "rule": rule, "seed": seed}


def wanted(key: dict, arguments: argparse.Namespace) -> bool:
    """Whether a run was asked for; dense attention always is, for the others are held against it."""
    if arguments.lengths and key["length"] not in arguments.lengths:
        return False
    named = not arguments.arms or key["arm"] in arguments.arms
    return key["arm"] == DENSE or (named and key["rule"] in arguments.rules)


def best_rate(found: results.Results, length: int) -> float:
    return min(found.having(length=length, rule=TUNING), key=lambda r: r["tuning_loss"])["rate"]


def add_step_times(
    times: dict[str, float], lacking: list[str], corpus: Corpus, length: int, settings: Settings
) -> None:
    """Milliseconds of a step of each arm, in turns with one whose time is on file and in whose time they are given, for
    the file may be from another machine: plain top-k for arms that are held against it, dense attention for others."""
    beside = {
        arm: plain(arm) if arm in remembering(settings) and plain(arm) in times else DENSE for arm in lacking
    }
    measured = step_times(list(dict.fromkeys([DENSE, *beside.values(), *lacking])), corpus, length, settings)
    for arm, other in beside.items():
        times[arm] = measured[arm] * times.get(other, measured[other]) / measured[other]


def step_times(names: list[str], corpus: Corpus, length: int, settings: Settings) -> dict[str, float]:
    """Milliseconds of a step of each arm, in turns; where they differ over a training, weighed."""
    steps = 100
    trainings = {
        arm: Training(
            arm, corpus, length, seed=0, steps=steps, tokens=settings.tokens, rate=min(settings.rates)
        )
        for arm in names
    }
    taken: dict[tuple[str, float], list[float]] = {}
    for _ in range(TIMED_STEPS):
        for arm, training in trainings.items():
            for moment, _ in moments(arm):
                taken.setdefault((arm, moment), []).append(training.step(int(moment * steps)))
    times = {key: 1e3 * min(seconds[1:]) for key, seconds in taken.items()}
    return {arm: sum(share * times[arm, moment] for moment, share in moments(arm)) for arm in names}


def run(
    found: results.Results, corpus: Corpus, settings: Settings, *, arm, length, rule, seed, rate=None
) -> dict:
    times = found.about["step_ms"][str(length)]
    steps = round(settings.steps * times[DENSE] / times[arm]) if rule == TIME else settings.steps
    training = Training(
        arm,
        corpus,
        length,
        seed=seed,
        steps=steps,
        tokens=settings.tokens,
        rate=rate or best_rate(found, length),
    )
    seconds = sum(training.step(i) for i in range(steps))
    tuning, loss = training.held_out_losses(settings.held_out)
    return {"steps": steps, "loss": loss, "tuning_loss": tuning, "seconds": seconds}


# --- what it says --------------------------------------------------------------------------------------------------


def gaps(found: results.Results, arm: str, length: int, rule: str) -> list[float]:
    """Loss over that of the dense arm of the same seed."""
    dense = {r["seed"]: r["loss"] for r in found.having(arm=DENSE, length=length, rule=STEPS)}
    rows = found.having(arm=arm, length=length, rule=rule)
    return [r["loss"] - dense[r["seed"]] for r in rows if r["seed"] in dense]


def over_plain(found: results.Results, arm: str, length: int, rule: str) -> list[float]:
    """Loss over that of plain top-k with the same budget, seed and rule."""
    losses = {r["seed"]: r["loss"] for r in found.having(arm=plain(arm), length=length, rule=rule)}
    rows = found.having(arm=arm, length=length, rule=rule)
    return [r["loss"] - losses[r["seed"]] for r in rows if r["seed"] in losses]


def in_words(differences: list[float]) -> str:
    if not differences:
        return ""
    gap = interval(differences)
    return f"{gap}{'' if gap.p is None or gap.p < 0.05 else ', not significant'}"


def show(found: results.Results, settings: Settings) -> None:
    for length in lengths_of(found, settings):
        times = found.about["step_ms"][str(length)]
        dense = [r["loss"] for r in found.having(arm=DENSE, length=length, rule=STEPS)]
        table = []
        for arm in present(found, settings, length):
            cells = [arm, f"{times[arm]:.0f}", f"{times[DENSE] / times[arm]:.2f}×"]
            table.append([*cells, *(in_words(gaps(found, arm, length, rule)) for rule in RULES)])
        results.show(
            f"Windows of {length} tokens, {settings.steps} steps of {settings.tokens} tokens, rate "
            f"{best_rate(found, length):g}: dense {statistics.mean(dense):.4f} nats, {times[DENSE]:.0f} ms per step",
            ["attention", "step ms", "as fast", "nats over dense, equal steps [95 %]", "equal time [95 %]"],
            table,
        )
    table = [
        [arm, f"{length:,}", *cells]
        for length in lengths_of(found, settings)
        for arm in remembering(settings)
        if any(cells := [in_words(over_plain(found, arm, length, rule)) for rule in RULES])
    ]
    if table:
        results.show(
            f"Beside plain top-k {min(settings.budgets)} with the same seeds (below 0: better)",
            ["attention", "T", "nats over plain, equal steps [95 %]", "equal time [95 %]"],
            table,
        )


def lengths_of(found: results.Results, settings: Settings) -> list[int]:
    """Those of which there is something to compare."""
    return [n for n in settings.lengths if present(found, settings, n)]


def present(found: results.Results, settings: Settings, length: int) -> list[str]:
    return [a for a in arms(settings)[1:] if any(gaps(found, a, length, rule) for rule in RULES)]


def draw(found: results.Results, settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = lengths_of(found, settings)
    figure, axes = plt.subplots(
        1,
        max(1, len(lengths)),
        figsize=(8 * max(1, len(lengths)), 5),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, length in zip(axes[0], lengths, strict=False):
        names = present(found, settings, length)
        for offset, rule, colour in ((-0.2, STEPS, "#1f6f8b"), (0.2, TIME, "#c8853d")):
            shown = [(i, g) for i, arm in enumerate(names) if (g := gaps(found, arm, length, rule))]
            found_gaps = [interval(g) for _, g in shown]
            means = [g.mean for g in found_gaps]
            error = [
                [g.mean - (g.mean if g.low is None else g.low) for g in found_gaps],
                [(g.mean if g.high is None else g.high) - g.mean for g in found_gaps],
            ]
            places = [i + offset for i, _ in shown]
            axis.bar(places, means, 0.38, yerr=error, capsize=4, color=colour, label=rule)
        axis.set_xticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names])
        axis.axhline(0, color="black", linewidth=1)
        axis.set(
            title=f"windows of {length} tokens", ylabel="held-out loss over dense (nats; below 0: better)"
        )
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.suptitle(
        "Trained from scratch with sparse attention, against dense attention; bars: 95 % over seeds"
    )
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
