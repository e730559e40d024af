"""Trains a small GPT on packed documents: sparse attention within each, an embedding whose frequent words are wide.

    python examples/train_packed.py --steps 300 --checkpoint packed.pt     # again: it goes on where it stopped

The text is the State of the Union addresses that come with the package, cut at the ends of paragraphs into documents of
up to 512 words. A step takes as many documents as fit into a row, end to end: nothing is padded, and no document sees
another. Of its document a token attends to the `--top-k` best keys. Embedding and head share tables of four widths.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sparse_attn
from sparse_attn.distillation.progress import reporting
from sparse_attn.nn import VariableWidthEmbedding, VariableWidthHead

CONTEXT, WIDTH, HEADS, LAYERS = 512, 128, 4, 2


class Pack(NamedTuple):
    """Documents end to end."""

    ids: Tensor  # int64 [T]
    cu_seq: Tensor  # int64 [S + 1]

    def positions(self) -> Tensor:
        """int64 [T], from 0 in each document."""
        lengths = self.cu_seq.diff()
        return torch.arange(len(self.ids)) - self.cu_seq[:-1].repeat_interleave(lengths)

    def targets(self) -> Tensor:
        """int64 [T]: the next token; −100 at the end of a document, which is followed by another."""
        targets = self.ids.roll(-1)
        targets[self.cu_seq[1:] - 1] = -100
        return targets


def words_of(text: str) -> list[str]:
    return re.findall(r" ?\w+|\n+|[^\w\n]", text)


class Corpus:
    """Words that occur three times or more are tokens; others are spelled."""

    def __init__(self, text: str) -> None:
        counts = Counter(words_of(text))
        self.tokens = sorted({w for w, n in counts.items() if n >= 3} | set(text))
        self.number = {token: n for n, token in enumerate(self.tokens)}
        self.documents = [torch.tensor(document) for document in self._documents(text)]

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for word in words_of(text):
            found += [self.number[word]] if word in self.number else [self.number[c] for c in word]
        return found

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[n] for n in ids)

    def _documents(self, text: str) -> Iterator[list[int]]:
        document: list[int] = []
        for paragraph in re.findall(r".+\n*", text):
            ids = self.encode(paragraph)[:CONTEXT]
            if document and len(document) + len(ids) > CONTEXT:
                yield document
                document = []
            document += ids
        yield document

    def counts(self) -> Tensor:
        return torch.cat(self.documents).bincount(minlength=len(self.tokens)).clamp(min=1)

    def pack(self, tokens: int, generator: torch.Generator) -> Pack:
        """Documents at random, as many as fit into `tokens`; every tenth is held out."""
        chosen, room = [], max(tokens, CONTEXT)
        for number in torch.randperm(len(self.documents), generator=generator).tolist():
            if number % 10 and len(self.documents[number]) <= room:
                chosen.append(self.documents[number])
                room -= len(chosen[-1])
        return packed(chosen)


def packed(documents: list[Tensor]) -> Pack:
    return Pack(torch.cat(documents), torch.tensor([0, *map(len, documents)]).cumsum(0))


class Block(nn.Module):
    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, cu_seq: Tensor) -> Tensor:  # [T, C] → [T, C]
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        y = sparse_attn.varlen_topk_attention(
            q, k, v, cu_seq, None, CONTEXT, CONTEXT, self.top_k, is_causal=True, window=self.top_k // 4, sinks=1
        )  # fmt: skip
        x = x + self.c_proj(y.flatten(1))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, counts: Tensor, top_k: int) -> None:
        super().__init__()
        self.wte = VariableWidthEmbedding.from_counts(counts, WIDTH, ratio=0.4)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        for table in (*self.wte.tables, self.wpe.weight):
            nn.init.normal_(table, std=0.02 if table is self.wpe.weight else WIDTH**-0.5)
        self.h = nn.ModuleList(Block(top_k) for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), VariableWidthHead(self.wte)

    def hidden(self, pack: Pack) -> Tensor:  # [T, C]
        x = self.wte(pack.ids) + self.wpe(pack.positions())
        for block in self.h:
            x = block(x, pack.cu_seq)
        return self.ln_f(x)

    def loss(self, pack: Pack) -> Tensor:
        return self.lm_head.loss(self.hidden(pack), pack.targets())

    @torch.no_grad()
    def generate(self, ids: list[int], count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            seen = torch.tensor(ids[-CONTEXT:])
            logits = self.lm_head(self.hidden(packed([seen]))[-1]) / 0.8
            ids = [*ids, int(torch.multinomial(logits.softmax(-1), 1, generator=generator))]
        return ids


def train(
    steps: int, *, tokens: int = 2048, top_k: int = 32, checkpoint: str | None = None, show: bool = False
) -> list[float]:
    """The loss of each step, in nats; with a checkpoint those of the steps before it, too."""
    torch.manual_seed(0)
    corpus = Corpus((resources.files("sparse_attn") / "data" / "state_of_the_union.txt").read_text("utf-8"))
    model = GPT(corpus.counts(), top_k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    history: list[float] = []
    if checkpoint is not None and Path(checkpoint).exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    with reporting("train", max(0, steps - len(history)), show or None) as advance:
        for step in range(len(history), steps):
            # Seeded by the step: what is resumed draws what an uninterrupted training would have.
            pack = corpus.pack(tokens, torch.Generator().manual_seed(step))
            loss = model.loss(pack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
            advance(f"loss {history[-1]:.3f}, {len(pack.cu_seq) - 1} documents")
            if checkpoint is not None and (step + 1 == steps or (step + 1) % 50 == 0):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
                torch.save(state, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)  # whole or not at all
    if show:
        with torch.no_grad():
            held_out = model.loss(packed(corpus.documents[::10][:16]))
        print(f"{len(corpus.tokens)} tokens, {model.wte.num_parameters():,} numbers in their tables")
        print(f"held out: {held_out:.3f} nats a token")
        for seed in range(2):
            print(f"\n{corpus.decode(model.generate(corpus.encode('Fellow'), 60, seed))}")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="in all, those of the checkpoint too")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--top-k", type=int, default=32, help="keys per query")
    parser.add_argument("--checkpoint", help="a file to go on from, written every 50 steps")
    given = parser.parse_args()
    train(given.steps, tokens=given.tokens, top_k=given.top_k, checkpoint=given.checkpoint, show=True)


if __name__ == "__main__":
    main()
