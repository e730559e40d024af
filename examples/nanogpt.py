"""Top-k attention in a nanoGPT-style model: the change is one line of its CausalSelfAttention.

    python examples/nanogpt.py            a tiny model learns to repeat a sequence, dense and sparse

In nanoGPT's model.py, `CausalSelfAttention.forward` calls

    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=…, is_causal=True)

and becomes sparse with

    y = sparse_attn.topk_attention(q, k, v, top_k=64, is_causal=True, window=16, sinks=4)

(q, k and v are [B, H, T, D] there already). Its dropout on the attention weights has no counterpart; the one on the
output stays. The block below is that module, complete.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparse_attn


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, top_k: int | None) -> None:
        super().__init__()
        self.heads, self.top_k = heads, top_k
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] → [B, T, C]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        if self.top_k is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = sparse_attn.topk_attention(q, k, v, self.top_k, is_causal=True, window=2, sinks=1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, top_k: int | None) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, top_k)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, top_k: int | None) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.Sequential(*(Block(width, heads, top_k) for _ in range(2)))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] → [B, T, V]
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.lm_head(self.ln_f(self.h(self.wte(ids) + self.wpe(positions))))


def train(top_k: int | None, steps: int = 400) -> float:
    """Random halves that repeat: only attention to the right place of the first half predicts the second."""
    torch.manual_seed(0)
    vocabulary, half = 16, 24
    model = GPT(vocabulary, 2 * half, width=64, heads=4, top_k=top_k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        first = torch.randint(vocabulary, (32, half))
        ids = torch.cat((first, first), 1)
        loss = nn.functional.cross_entropy(
            model(ids[:, :-1])[:, half:].flatten(0, 1), ids[:, half + 1 :].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    for top_k in (None, 8):
        print(f"top_k={top_k}: {train(top_k):.3f} nats a token, at random {torch.tensor(16.0).log():.3f}")
