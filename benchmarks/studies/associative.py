"""An exact task: which value stood beside this key? A small model learns it, then attends to few keys.

    sparse-attn study associative            three seeds, a minute or two of one core each
    sparse-attn study associative --quick    one seed, short sequences

A sequence tells random pairs of a key and a value, a pair at each place, then asks for all keys in another order; what
is counted is how often the model's likeliest value is the one that was told. Nothing but attention to one place, which
no other can stand for, gives the answer; chance gives one in the number of values. The model, two blocks of the demo's
GPT without positions, learns with dense attention, which is the ceiling; then each selection chooses the keys of both
blocks, at each budget, with nothing learned anew: exact selection for each head is the oracle of the others. Indexers
and low-rank scorers are fitted to the trained model on other sequences. Rows already in the results file are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies import results
from benchmarks.studies.statistics import interval
from sparse_attn.cli.console import count
from sparse_attn.demo.model import LAYERS, WIDTH, Block
from sparse_attn.demo.optimizers import optimizers_of
from sparse_attn.distillation import attention_layers, observe, train_indexers
from sparse_attn.distillation.progress import reporting
from sparse_attn.nn import LowRankScorer
from sparse_attn.selection import Blocks, Exact, Hierarchical, LowRank, Refined, Rounded

DENSE = "dense"
BLOCK = 8  # keys and queries: sequences are short here
RANK, SINKS, WARM_UP = 8, 4, 20
BATCHES = 16  # of sequences that were not learned from, for each count


@dataclass(frozen=True)
class Settings:
    """What all seeds share."""

    symbols: int = 256  # keys; as many values
    pairs: tuple[int, ...] = (16, 64, 256)  # of a step, one drawn for each; as many as the last are counted
    tokens: int = 2048  # of a step
    steps: int = 200
    rate: float = 1e-2  # of AdamW: embeddings and head
    indexer_steps: int = 100
    budgets: tuple[int, ...] = (8, 32, 128)
    seeds: int = 3

    @property
    def length(self) -> int:
        return 2 * self.pairs[-1]


QUICK = Settings(
    symbols=64, pairs=(8, 64), tokens=1024, steps=150, indexer_steps=30, budgets=(8, 32), seeds=1
)


class Recaller(nn.Module):
    """Ids of (key, value or none) at each place in, logits of the value out; it knows no places."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = symbols
        self.keys, self.values = nn.Embedding(symbols, WIDTH), nn.Embedding(symbols + 1, WIDTH)
        self.blocks = nn.ModuleList(Block(None, 0) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, symbols, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, T] → [B, T, symbols]"""
        stream = self.keys(ids // (self.symbols + 1)) + self.values(ids % (self.symbols + 1))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def sequences(settings: Settings, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(int64 [B, 2·pairs]: pairs in the first half, their keys in the second; the values asked for [B, pairs])."""
    batch, symbols = max(1, settings.tokens // (2 * pairs)), settings.symbols

    def orders(size: int) -> Tensor:
        return torch.rand(batch, size, generator=generator).argsort(-1)

    keys = orders(symbols)[:, :pairs]
    values = torch.randint(symbols, (batch, pairs), generator=generator)
    again = orders(pairs)
    told, asked = keys * (symbols + 1) + values, keys.gather(1, again) * (symbols + 1) + symbols
    return torch.cat((told, asked), 1), values.gather(1, again)


def train(settings: Settings, seed: int) -> Recaller:
    torch.manual_seed(seed)
    model = Recaller(settings.symbols).train()
    optimizers = optimizers_of(model)
    optimizers[1].param_groups[0]["lr"] = settings.rate
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    with reporting(f"seed {seed}", settings.steps, True) as advance:
        for step in range(settings.steps):
            factor = min(1.0, (step + 1) / WARM_UP) * (1.0 - 0.95 * step / settings.steps)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.zero_grad()
            # Few pairs first: what they teach holds for more, and is found sooner.
            known = 1 + min(len(settings.pairs) - 1, 2 * len(settings.pairs) * step // settings.steps)
            pairs = settings.pairs[int(torch.randint(known, (), generator=generator))]
            ids, values = sequences(settings, pairs, generator)
            loss = F.cross_entropy(model(ids)[:, pairs:].flatten(0, 1), values.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            advance(f"{pairs} pairs: {loss.item():.3f} nats")
    return model.eval()


class Arms:
    """The ways of choosing keys for a trained model: `use` gives its layers one."""

    def __init__(self, model: Recaller, settings: Settings, seed: int) -> None:
        self.model, self.layers = model, attention_layers(model)
        generator = torch.Generator().manual_seed(1_000 + seed)
        stream = [
            sequences(settings, settings.pairs[-1], generator)[0] for _ in range(settings.indexer_steps)
        ]
        torch.manual_seed(seed)
        self.indexers = train_indexers(model, stream, share="kv", progress=True)
        self.scorers: dict[str, nn.Module] = {}
        for name, heads in observe(model, stream[0]).layers.items():
            scorer = LowRankScorer(heads.key.shape[1], heads.key.shape[3], RANK)
            self.scorers[name] = scorer.calibrate(heads.query, heads.key).fit()

    def names(self, budget: int) -> list[str]:
        blocks = ["refined blocks", "hierarchical", "blocks"] if budget >= 3 * BLOCK else []
        return [
            "exact",
            "exact, all heads",
            "int8",
            "indexer, per head",
            f"low rank {RANK}",
            *blocks,
            "window",
        ]

    def use(self, arm: str, budget: int | None) -> None:
        blocks = Blocks(BLOCK, BLOCK)
        plain = {
            "exact": Exact(),
            "int8": Rounded(),
            "blocks": blocks,
            "refined blocks": Refined(4, blocks),
            "hierarchical": Hierarchical(BLOCK, 4, 4),
        }
        for name, layer in self.layers.items():
            layer.top_k, layer.window, layer.sinks = budget, 0, 0
            layer.share = "all" if arm == "exact, all heads" else "none"
            # An indexer is a module of the layer's, and others cannot take a module's place.
            del layer.token_selector
            layer.token_selector = plain.get(arm)
            if arm == "window" and budget is not None:
                layer.window, layer.sinks = budget - SINKS, SINKS
            elif arm.startswith("indexer"):
                del layer.token_selector
                layer.token_selector = self.indexers[name]
            elif arm.startswith("low rank"):
                layer.token_selector = LowRank(self.scorers[name])


@torch.no_grad()
def accuracy(model: Recaller, settings: Settings, seed: int) -> float:
    """The share of right answers, in sequences that are the same for all arms."""
    generator = torch.Generator().manual_seed(2_000 + seed)
    right = []
    for _ in range(BATCHES):
        ids, values = sequences(settings, settings.pairs[-1], generator)
        right.append((model(ids)[:, settings.pairs[-1] :].argmax(-1) == values).float().mean())
    return float(torch.stack(right).mean())


def runs(settings: Settings, seed: int) -> Iterator[dict]:
    model = train(settings, seed)
    arms = Arms(model, settings, seed)
    for arm, budget in [(DENSE, None), *((a, k) for k in settings.budgets for a in arms.names(k))]:
        arms.use(arm, budget)
        yield {"arm": arm, "keys": budget, "accuracy": accuracy(model, settings, seed)}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)
    parser.add_argument(
        "--seeds", type=count(1), help=f"how many (default: {Settings.seeds}; one with --quick)"
    )


def execute(arguments: argparse.Namespace, settings: Settings | None = None) -> int:
    settings = settings or (QUICK if arguments.quick else Settings())
    settings = replace(settings, seeds=arguments.seeds or settings.seeds)
    found = results.start("associative", arguments)
    results.keep_settings(found, asdict(settings))
    for seed in range(settings.seeds):
        if found.row(seed=seed) is None:
            rows = [{"seed": seed, **row} for row in runs(settings, seed)]
            found.rows += rows[:-1]
            found.add(rows[-1])  # a seed whole or not at all
    show(found, settings)
    draw(found, settings)
    found.wrote()
    return 0


# --- what it says --------------------------------------------------------------------------------------------------


def accuracies(found: results.Results, arm: str, keys: int | None) -> list[float]:
    return [row["accuracy"] for row in found.having(arm=arm, keys=keys)]


def arms_of(found: results.Results) -> list[str]:
    return [arm for arm in dict.fromkeys(row["arm"] for row in found.rows) if arm != DENSE]


def cell(values: list[float]) -> str:
    if not values:
        return ""
    share = interval(values)
    half = "" if share.high is None else f" ± {100 * (share.high - share.mean):.1f}"
    return f"{100 * share.mean:.1f} %{half}"


def show(found: results.Results, settings: Settings) -> None:
    table = [[f"{DENSE} (ceiling)", *[cell(accuracies(found, DENSE, None))] * len(settings.budgets)]]
    for arm in arms_of(found):
        name = f"{arm} (oracle)" if arm == "exact" else arm
        table.append([name, *(cell(accuracies(found, arm, k)) for k in settings.budgets)])
    results.show(
        f"Right answers: {settings.pairs[-1]} pairs told and asked for in {settings.length} tokens, "
        f"{len(found.having(arm=DENSE))} seeds [95 %]; chance gives {1 / settings.symbols:.1%}",
        ["selection", *(f"{k} keys ({k / settings.length:.1%})" for k in settings.budgets)],
        table,
    )


def draw(found: results.Results, settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for i, arm in enumerate(arms_of(found)):
        points = [(k, a) for k in settings.budgets if (a := accuracies(found, arm, k))]
        shares = [interval(a) for _, a in points]
        halves = [0.0 if s.high is None else s.high - s.mean for s in shares]
        x, y = [k for k, _ in points], [s.mean for s in shares]
        axis.errorbar(x, y, halves, label=arm, marker="o", capsize=3, color=f"C{i % 10}")
    axis.axhline(interval(accuracies(found, DENSE, None)).mean, color="black", linewidth=1, label=DENSE)
    axis.set(xscale="log", xlabel="keys per query", ylabel="right answers", ylim=(-0.03, 1.05))
    axis.set_xticks(settings.budgets, list(map(str, settings.budgets)))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.suptitle(
        f"Associative recall, {settings.length} tokens: few keys in a model that learned with all"
    )
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
