"""Small teachers for the tests of `sparse_attn.distillation`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from sparse_attn.nn import TopKAttention

VOCABULARY, LENGTH, BATCH = 20, 24, 2


class Block(nn.Module):
    def __init__(self, num_heads: int, num_kv_heads: int, top_k: int | None) -> None:
        super().__init__()
        self.attention = TopKAttention(24, num_heads, top_k, num_kv_heads=num_kv_heads, dropout=0.5)


class Teacher(nn.Module):
    """Layers of different head counts, dropout, logits in an object: nothing like the demo's model."""

    def __init__(self, heads=((4, 4), (6, 2)), top_k: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.blocks = nn.ModuleList(Block(*pair, top_k) for pair in heads)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, ids):
        stream = self.embedding(ids)
        stream = stream + 0.1 * torch.arange(ids.shape[1], device=ids.device).unsqueeze(1).sin()
        for block in self.blocks:
            stream = stream + 3.0 * block.attention(2.0 * stream)
        return SimpleNamespace(logits=self.head(stream))


def batches(count: int, length: int = LENGTH, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (count, BATCH, length), generator=generator))
