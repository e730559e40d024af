"""Two published tests of "bespoke token dimensions", run again as they were described, then with the fault removed.

    sparse-attn study leak            a quarter of an hour on one core
    sparse-attn study leak --quick    two minutes

1. The scaling test: 200 token types, 64-token windows of an independent Zipf(1.1) sequence, the answer is the window's
   most frequent token, at most 20 steps, the loss is that of the last training batch. Beside it: a plain table at ten
   times the learning rate, a plain table with other first weights, a constant guess, and both tables trained for
   longer and tested on windows that they have not seen.
2. The later validation: the next token of an independent Zipf(1.2) sequence, by an encoder without a causal mask; then
   with the mask, beside the entropy of the source, below which no loss can lie.

Rows already in the results file are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies import results
from benchmarks.studies.statistics import interval

# --- the scaling test: corpus → steps, as published, and the published ratio of losses -----------------------------
TYPES, EXPONENT, WINDOW, BATCH, WIDTH = 200, 1.1, 64, 8, 128
STEPS = {1000: 5, 5000: 10, 20_000: 15, 50_000: 20}
PUBLISHED = {1000: 0.989, 5000: 0.186, 20_000: 0.042, 50_000: 0.358}
LONGER, TESTED = 2000, 4096
# --- the later validation -----------------------------------------------------------------------------------------
VOCABULARY, SLOPE, CONTEXT, ROWS, CORPUS = 1000, 1.2, 32, 16, 200_000
PUBLISHED_LOSS = 0.151


@dataclass(frozen=True)
class Sizes:
    """How much of it is run."""

    scaling_seeds: int
    longer_seeds: int
    mask_seeds: int
    mask_steps: int
    mask_kinds: tuple[str, ...] = ("plain", "bands")


QUICK, FULL = Sizes(10, 1, 1, 800, ("plain",)), Sizes(50, 5, 3, 1500)


class Bands(nn.Module):
    """Three bands of widths of their own, each projected to the model's width unless it has it.

    Args:
        bands: the tokens of each band, int64 [n_b].
        widths: their widths.
        dim: the model's width.
    """

    def __init__(self, bands: list[Tensor], widths: list[int], dim: int) -> None:
        super().__init__()
        count = sum(map(len, bands))
        band, row = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
        for b, tokens in enumerate(bands):
            band[tokens], row[tokens] = b, torch.arange(len(tokens))
        self.register_buffer("band", band)
        self.register_buffer("row", row)
        self.tables = nn.ModuleList(nn.Embedding(len(t), w) for t, w in zip(bands, widths, strict=True))
        self.out = nn.ModuleList(nn.Identity() if w == dim else nn.Linear(w, dim, bias=False) for w in widths)
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] → [..., dim]."""
        found = torch.empty(*ids.shape, self.dim)
        for b, (table, out) in enumerate(zip(self.tables, self.out, strict=True)):
            chosen = self.band[ids] == b
            found[chosen] = out(table(self.row[ids[chosen]]))
        return found


def zipf(types: int, exponent: float) -> Tensor:
    """Probabilities, float32 [types]."""
    weights = torch.arange(1, types + 1, dtype=torch.float64) ** -exponent
    return (weights / weights.sum()).float()


def entropy(probabilities: Tensor) -> float:
    """Nats."""
    p = probabilities[probabilities > 0].double()
    return float(-(p * p.log()).sum())


def bands_by_rank(tokens: Tensor, types: int, shares: tuple[float, float]) -> list[Tensor]:
    """Tokens by falling count: the first share of the types, up to the second, the rest."""
    order = torch.bincount(tokens, minlength=types).argsort(descending=True, stable=True)
    first, second = (int(s * types) for s in shares)
    return [order[:first], order[first:second], order[second:]]


# --- 1. the scaling test -------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """The published test model: mean of the embeddings, LayerNorm, a linear layer."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = embedding, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TYPES)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] → logits [B, TYPES]."""
        return self.head(self.norm(self.embedding(ids).mean(dim=1)))


def embedding_of(kind: str, corpus: Tensor) -> nn.Module:
    """The "plain" table, or "bands" as that test made them: the rarest 85 % of types 0.25× as wide, the rest 1.75×."""
    if kind == "plain":
        return nn.Embedding(TYPES, WIDTH)
    wide, _, narrow = bands_by_rank(corpus, TYPES, (0.15, 0.15))  # the middle band of that code was empty
    return Bands([wide, narrow], [224, 32], WIDTH)


def published_batches(corpus: Tensor, steps: int) -> Iterator[Tensor]:
    """Overlapping windows from the start of the corpus, [BATCH, WINDOW] each."""
    for step in range(min(steps, len(corpus) // WINDOW)):
        start = step * WINDOW
        if start + WINDOW * BATCH >= len(corpus):
            return
        places = start + torch.arange(BATCH) * (WINDOW // BATCH)
        yield corpus[places[:, None] + torch.arange(WINDOW)]


def train_pooled(model: Pooled, batches: Iterator[Tensor], rate: float = 1e-3) -> float:
    """The loss of the last batch, before its step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    loss = torch.tensor(0.0)
    for windows in batches:
        loss = F.cross_entropy(model(windows), windows.mode(dim=1).values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def scaling_row(size: int, seed: int) -> dict:
    """The published test once, and two more plain tables: other first weights, ten times the learning rate."""
    torch.manual_seed(1_000_003 * seed + size)
    corpus = torch.multinomial(zipf(TYPES, EXPONENT), size, replacement=True)
    arms = {"plain": 1e-3, "bands": 1e-3, "plain_again": 1e-3, "plain_faster": 1e-2}
    losses = {
        arm: train_pooled(
            Pooled(embedding_of(arm.split("_")[0], corpus)), published_batches(corpus, STEPS[size]), rate
        )
        for arm, rate in arms.items()
    }
    return {"test": "scaling", "corpus": size, "seed": seed, **losses}


def longer_row(kind: str, seed: int) -> dict:
    """The same task, LONGER steps on fresh windows, the loss on TESTED windows that were not trained on."""
    torch.manual_seed(seed)
    source = zipf(TYPES, EXPONENT)

    def fresh(count: int) -> Tensor:
        return torch.multinomial(source, count * WINDOW, replacement=True).view(count, WINDOW)

    corpus = fresh(1000).flatten()
    tested = fresh(TESTED)
    model = Pooled(embedding_of(kind, corpus))
    train_pooled(model, (fresh(BATCH) for _ in range(LONGER)))
    answers = tested.mode(dim=1).values
    guess = torch.bincount(fresh(20_000).mode(dim=1).values, minlength=TYPES).double() + 1e-3
    with torch.no_grad():
        logits = model(tested)
    return {
        "test": "longer",
        "kind": kind,
        "seed": seed,
        "loss": float(F.cross_entropy(logits, answers)),
        "accuracy": float((logits.argmax(-1) == answers).float().mean()),
        "constant_loss": float(-(guess / guess.sum())[answers].log().mean()),
        "constant_accuracy": float((answers == guess.argmax()).float().mean()),
    }


# --- 2. the later validation ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The published validation model at half its depth: nn.TransformerEncoderLayer, learned positions."""

    def __init__(self, embedding: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.embedding, self.causal = embedding, causal
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, CONTEXT] → logits [B, CONTEXT, VOCABULARY]."""
        stream = self.embedding(ids) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT) if self.causal else None
        for layer in self.layers:
            stream = layer(stream, src_mask=mask, is_causal=self.causal)
        return self.head(self.norm(stream))


def mask_row(kind: str, causal: bool, seed: int, steps: int) -> dict:
    """Trains on 85 % of a sequence, tests on the rest: the loss by place in the window."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    corpus = torch.multinomial(zipf(VOCABULARY, SLOPE), CORPUS, replacement=True)
    train, tested = corpus[: int(0.85 * CORPUS)], corpus[int(0.85 * CORPUS) :]
    embedding: nn.Module = nn.Embedding(VOCABULARY, WIDTH)
    if kind == "bands":
        bands = bands_by_rank(train, VOCABULARY, (0.1, 0.8))
        embedding = Bands(bands, [int(WIDTH * 1.4), WIDTH, int(WIDTH * 0.6)], WIDTH)
    model = Encoder(embedding, causal=causal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = next_token_loss(model, train, ROWS).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        places = torch.stack([next_token_loss(model, tested, 64) for _ in range(32)]).mean(0)
    return {
        "test": "mask",
        "kind": kind,
        "causal": causal,
        "seed": seed,
        "steps": steps,
        "loss": float(places.mean()),
        "last_place": float(places[-1]),
        "other_places": float(places[:-1].mean()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
    }


def next_token_loss(model: Encoder, tokens: Tensor, rows: int) -> Tensor:
    """Loss by place, [CONTEXT], over random windows."""
    starts = torch.randint(len(tokens) - CONTEXT - 1, (rows,))
    windows = tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
    logits = model(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return loss.view(rows, CONTEXT).mean(0)


# --- the study -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)


def execute(arguments: argparse.Namespace, sizes: Sizes | None = None) -> int:
    sizes = sizes or (QUICK if arguments.quick else FULL)
    found = results.start("leak", arguments)
    found.about = {
        "entropy_scaling": entropy(zipf(TYPES, EXPONENT)),
        "entropy_mask": entropy(zipf(VOCABULARY, SLOPE)),
    }
    runs = list(all_runs(sizes))
    with results.bar("runs", len(runs)) as advance:
        for key in runs:
            if found.row(**key) is None:
                test, *values = key.values()
                found.add(ROW_OF[test](*values))
            advance()
    show(found)
    draw(found)
    found.wrote()
    return 0


def all_runs(sizes: Sizes) -> Iterator[dict]:
    """The keys of all rows, their values in the order of the functions' parameters."""
    for size in STEPS:
        for seed in range(sizes.scaling_seeds):
            yield {"test": "scaling", "corpus": size, "seed": seed}
    for kind in ("plain", "bands"):
        for seed in range(sizes.longer_seeds):
            yield {"test": "longer", "kind": kind, "seed": seed}
    for seed in range(sizes.mask_seeds):
        for kind in sizes.mask_kinds:
            for causal in (False, True):
                steps = sizes.mask_steps
                yield {"test": "mask", "kind": kind, "causal": causal, "seed": seed, "steps": steps}


ROW_OF = {"scaling": scaling_row, "longer": longer_row, "mask": mask_row}


def kinds_of(found: results.Results) -> list[str]:
    return sorted({r["kind"] for r in found.having(test="mask")}, reverse=True)


def quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def ratios(found: results.Results, size: int, name: str) -> list[float]:
    return [r[name] / r["plain"] for r in found.having(test="scaling", corpus=size)]


def show(found: results.Results) -> None:
    table = []
    for size in STEPS:
        cells = [f"{size:,}", f"{PUBLISHED[size]:.3f}"]
        for name in ("bands", "plain_faster", "plain_again"):
            values = ratios(found, size, name)
            low, middle, high = (quantile(values, q) for q in (0.025, 0.5, 0.975))
            cells += [f"{middle:.3f} [{low:.3f}, {high:.3f}]"]
        better = [r < 1 for r in ratios(found, size, "bands")]
        table.append([*cells, f"{sum(better)} of {len(better)}"])
    results.show(
        "1. The scaling test as published: loss over the plain model's (median, and the middle 95 % of seeds)",
        ["corpus", "published", "bands", "plain, rate × 10", "plain, other weights", "bands better"],
        table,
    )
    table = []
    for kind in ("plain", "bands"):
        rows = found.having(test="longer", kind=kind)
        names = ("loss", "accuracy", "constant_loss", "constant_accuracy")
        table.append([kind, *(str(interval([r[n] for r in rows])) for n in names)])
    results.show(
        f"The same task, {LONGER} steps, windows not seen before",
        ["table", "loss", "accuracy", "constant guess: loss", "accuracy"],
        table,
    )
    table = []
    for causal in (False, True):
        for kind in kinds_of(found):
            rows = found.having(test="mask", kind=kind, causal=causal)
            cells = [str(interval([r[n] for r in rows])) for n in ("loss", "other_places", "last_place")]
            table.append(
                [f"{'causal mask' if causal else 'no mask'}, {kind}", *cells, f"{rows[0]['parameters']:,}"]
            )
    source = found.about["entropy_mask"]
    results.show(
        f"2. Next token of an independent sequence: entropy {source:.4f} nats "
        f"(over {CONTEXT}: {source / CONTEXT:.4f}); published {PUBLISHED_LOSS}",
        ["model", "loss", "places that see the next token", "last place", "parameters"],
        table,
    )


def draw(found: results.Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 6.5), layout="constrained")
    places = torch.arange(len(STEPS)).tolist()
    arms = (("bands", "bands", "C0"), ("plain_faster", "plain, learning rate × 10", "C1"))
    for shift, (name, label, colour) in zip((-0.18, 0.18), arms, strict=True):
        values = [ratios(found, size, name) for size in STEPS]
        boxes = left.boxplot(
            values, positions=[p + shift for p in places], widths=0.3, whis=(2.5, 97.5), patch_artist=True
        )
        for box in boxes["boxes"]:
            box.set_facecolor(colour)
        left.plot([], [], "s", color=colour, label=f"{label}, all seeds")
    left.plot(places, list(PUBLISHED.values()), "r*", markersize=14, label="published, one run")
    left.axhline(1, color="black", linewidth=1)
    left.set_xticks(places, [f"{size:,}\n{steps} steps" for size, steps in STEPS.items()])
    left.set(
        yscale="log",
        xlabel="tokens in the corpus",
        ylabel="loss of the last batch over the plain table's",
        title="The scaling test: a higher learning rate does what the bands do",
    )
    left.legend()
    names, heights, colours = [], [], []
    for causal in (False, True):
        for kind in kinds_of(found):
            rows = found.having(test="mask", kind=kind, causal=causal)
            names.append(f"{'causal mask' if causal else 'no mask'}\n{kind}")
            heights.append(sum(r["loss"] for r in rows) / len(rows))
            colours.append("C2" if causal else "C3")
    bars = right.bar(names, heights, color=colours)
    right.bar_label(bars, [f"{h:.3f}" for h in heights])
    source = found.about["entropy_mask"]
    right.axhline(
        source, color="black", label=f"entropy of the source, {source:.3f}: no model can be below it"
    )
    right.axhline(
        source / CONTEXT, color="black", linestyle=":", label="entropy / 32: only the last place must guess"
    )
    right.set(ylabel="validation loss (nats)", title="Without a causal mask the model reads the answer")
    right.legend(loc="center left")
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)
