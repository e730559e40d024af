"""The demo's model: a small causal GPT whose attention is dense or top-k, its embedding plain or of variable width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_attn.nn import TopKAttention, VariableWidthEmbedding, VariableWidthHead
from sparse_attn.planner import WidthPlan

WIDTH, HEADS, LAYERS = 128, 4, 2


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer MLP, each added to the stream."""

    def __init__(self, top_k: int | None, window: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = TopKAttention(WIDTH, HEADS, top_k, window=window)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        )
        # Each block starts as the identity, which lets a small model learn at a high rate from the first step.
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, stream: Tensor) -> Tensor:
        """stream [B, T, WIDTH] → the same shape."""
        stream = stream + self.attention(self.norm_attention(stream))
        return stream + self.mlp(self.norm_mlp(stream))


class GPT(nn.Module):
    """Characters in, logits of the next character out.

    ``top_k=None`` is dense attention; `window` of the top_k keys are always the latest ones. With a `plan` the
    embedding and the head have its widths, else they are nn.Embedding and nn.Linear.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        top_k: int | None,
        window: int = 0,
        plan: WidthPlan | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, WIDTH) if plan is None else VariableWidthEmbedding(plan)
        for table in [self.embedding.weight] if plan is None else self.embedding.tables:
            nn.init.normal_(table, std=WIDTH**-0.5)
        self.register_buffer("positions", _waves(context))
        self.blocks = nn.ModuleList(Block(top_k, window) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = (
            nn.Linear(WIDTH, vocabulary, bias=False) if plan is None else VariableWidthHead.from_plan(plan)
        )
        for table in [self.head.weight] if plan is None else self.head.embedding.tables:
            nn.init.zeros_(table)  # the first prediction is uniform: loss ln(vocabulary)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T ≤ context] → what the head reads, [B, T, WIDTH]."""
        stream = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return self.norm(stream)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T ≤ context] → logits [B, T, vocabulary]."""
        return self.head(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of ids and targets [B, T], in nats."""
        if isinstance(self.head, VariableWidthHead):
            return self.head.loss(self.hidden(ids), targets, reduction=reduction)
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), reduction=reduction)

    def vocabulary_parameters(self) -> int:
        """Numbers in the embedding and in the head."""
        return sum(p.numel() for module in (self.embedding, self.head) for p in module.parameters())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode inside, and as it was afterwards."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int, seed: int, temperature: float = 0.8) -> Iterator[int]:
        """`count` characters after `prompt`, drawn from the model one by one."""
        generator = torch.Generator().manual_seed(seed)
        ids = list(prompt)
        for _ in range(count):
            seen = torch.tensor([ids[-self.context :]], device=self.positions.device)
            with self.evaluating():  # a step at a time: who takes the characters may train in between
                logits = self(seen)[0, -1].float().cpu() / temperature
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            yield ids[-1]


def _waves(context: int) -> Tensor:
    """Sinusoids, [context, WIDTH]: unlike learned positions they show from the start what "the one before" is."""
    angle = torch.arange(context)[:, None] * torch.exp(
        torch.arange(0, WIDTH, 2) * (-math.log(10_000.0) / WIDTH)
    )
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1) * WIDTH**-0.5
