"""What the widths study trains: text as byte-pair tokens, tables of several shapes, and a small causal GPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_attn import variable_width_cross_entropy, variable_width_embedding
from sparse_attn.cli.console import UsageError, refusals
from sparse_attn.demo.model import WIDTH, Block
from sparse_attn.demo.text import read
from sparse_attn.planner import WidthPlan, plan_widths

LAYERS = 2
HELD_OUT = 10  # every tenth document, or of a single text the last tenth


@dataclass(frozen=True)
class Corpus:
    """Token ids of the text to train on and of the text held out, and how often each token occurs in the former."""

    train: Tensor  # int64 [N]
    held_out: Tensor  # int64 [M]
    counts: Tensor  # int64 [V]
    documents: int
    characters: int


def load(files: Sequence[Path] | None, vocabulary: int, *, train: int, held_out: int) -> Corpus:
    """Byte-pair tokens of the files, or of the package's State of the Union addresses; the merges are learned from the
    training part alone. `train` and `held_out` are the longest windows of either part."""
    from tokenizers import ByteLevelBPETokenizer

    if files:
        with refusals("--text "):
            texts = [read(f) for f in sorted(files, key=lambda f: f.name)]
    else:
        texts = [(resources.files("sparse_attn") / "data" / "state_of_the_union.txt").read_text("utf-8")]
    if len(texts) >= HELD_OUT:
        tested = texts[HELD_OUT - 1 :: HELD_OUT]
        trained = [t for i, t in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1]
    else:
        joined = "\n".join(texts)
        cut = len(joined) - len(joined) // HELD_OUT
        trained, tested = [joined[:cut]], [joined[cut:]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(trained, vocab_size=vocabulary, min_frequency=2, show_progress=False)

    def encode(parts: list[str]) -> Tensor:
        return torch.tensor([i for part in parts for i in tokenizer.encode(part).ids])

    corpus = encode(trained), encode(tested)
    for what, tokens, window in zip(("train on", "hold out"), corpus, (train, held_out), strict=True):
        if len(tokens) <= window + 1:
            raise UsageError(
                f"--text has {len(tokens)} tokens to {what}; a window of this study takes {window + 1}"
            )
    counts = torch.bincount(corpus[0], minlength=tokenizer.get_vocab_size())
    return Corpus(*corpus, counts, len(texts), sum(map(len, texts)))


@dataclass(frozen=True)
class Shape:
    """An embedding table: `widths[b]` numbers for each token of band b, projected to the model unless that wide."""

    widths: tuple[int, ...]
    token_band: Tensor  # int32 [V]

    @property
    def band_sizes(self) -> list[int]:
        return torch.bincount(self.token_band, minlength=len(self.widths)).tolist()

    def parameters(self) -> int:
        tables = sum(n * w for n, w in zip(self.band_sizes, self.widths, strict=True))
        return tables + sum(WIDTH * w for w in self.widths if w != WIDTH)


def full(counts: Tensor) -> Shape:
    return Shape((WIDTH,), torch.zeros(len(counts), dtype=torch.int32))


def uniform(counts: Tensor, budget: int) -> Shape:
    """One width for all tokens, the widest within the budget."""
    return Shape((budget // (len(counts) + WIDTH),), torch.zeros(len(counts), dtype=torch.int32))


def planned(counts: Tensor, budget: int) -> Shape:
    """What the package's planner makes of the counts within the budget."""
    # One is added so that a token which the training text lacks is not starved of all width.
    plan: WidthPlan = plan_widths(counts + 1, WIDTH, budget=budget)
    return Shape(plan.widths, plan.token_band)


def three_bands(counts: Tensor) -> Shape:
    """The published recipe: the tokens of 80 % of the occurrences 1.5× as wide, of the next 15 % 1×, the rest 0.4×."""
    order = counts.argsort(descending=True, stable=True)
    before = (counts[order].cumsum(0) - counts[order]).double() / counts.sum()
    band = torch.empty(len(counts), dtype=torch.int32)
    band[order] = ((before >= 0.80).int() + (before >= 0.95).int()).to(torch.int32)
    return Shape((WIDTH * 3 // 2, WIDTH, WIDTH * 2 // 5), band)


class Tied(nn.Module):
    """An embedding and an output head that share their numbers.

    Rows and projections start such that every element of a token's vector has variance 1 / WIDTH, in every shape.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tables, self.projections = nn.ParameterList(), nn.ParameterList()
        for size, width in zip(shape.band_sizes, shape.widths, strict=True):
            self.tables.append(torch.randn(size, width) * width**-0.5)
            if width != WIDTH:
                self.projections.append(torch.randn(WIDTH, width) * WIDTH**-0.5)
        self.projected = [w != WIDTH for w in shape.widths]
        row = torch.empty_like(shape.token_band)
        for band in range(len(shape.widths)):
            inside = shape.token_band == band
            row[inside] = torch.arange(int(inside.sum()), dtype=torch.int32)
        self.register_buffer("token_band", shape.token_band)
        self.register_buffer("token_row", row)

    def parts(self) -> tuple[list[Tensor], list[Tensor | None], Tensor, Tensor]:
        present = iter(self.projections)
        projections = [next(present) if p else None for p in self.projected]
        return list(self.tables), projections, self.token_band, self.token_row

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] → [B, T, WIDTH], elements of variance 1."""
        return variable_width_embedding(ids, *self.parts()) * WIDTH**0.5

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """hidden [B, T, WIDTH], targets [B, T] → cross-entropy in nats."""
        return variable_width_cross_entropy(hidden, targets, *self.parts(), reduction=reduction)


class GPT(nn.Module):
    """Causal, pre-norm, learned positions; the table of `shape` at both ends."""

    def __init__(self, shape: Shape, context: int, seed: int) -> None:
        super().__init__()
        # The body starts from the same numbers in every arm of a seed.
        torch.manual_seed(seed)
        self.positions = nn.Parameter(torch.randn(context, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(None, 0) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.vocabulary = Tied(shape)

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """windows [B, T + 1] → cross-entropy of the tokens after the first, in nats."""
        stream = self.vocabulary(windows[:, :-1]) + self.positions[: windows.shape[1] - 1]
        for block in self.blocks:
            stream = block(stream)
        return self.vocabulary.loss(self.norm(stream), windows[:, 1:], reduction)

    def optimizers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, at one rate in all arms; AdamW at the tuned rate for the rest."""
        inner = [p for p in self.blocks.parameters() if p.dim() == 2]
        held = {id(p) for p in inner}
        outer = [p for p in self.parameters() if id(p) not in held]
        return [
            torch.optim.Muon(inner, lr=0.02, weight_decay=0.0),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
