"""Which keys the trained top-k model chose for the end of a held-out sentence."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.demo.model import GPT
from sparse_attn.demo.text import Corpus

QUERIES, KEYS = 40, 112  # as many as stay legible, one character per cell


@dataclass(frozen=True)
class ChosenKeys:
    """Attention weights of one head over its chosen keys, for the last characters of a text."""

    text: str  # the keys shown; the queries are its last len(weights) characters
    layer: int
    head: int
    top_k: int
    window: int
    context: int
    weights: list[list[float | None]]  # [queries][keys]; None: not chosen
    outside: float  # share of the attention weight that fell on keys before those shown

    @property
    def queries(self) -> str:
        return self.text[-len(self.weights) :]


@torch.no_grad()
def chosen_keys(model: GPT, corpus: Corpus) -> ChosenKeys:
    """Looks through all heads and shows the one whose weight lies furthest back, the least trivial one."""
    ids = _end_of_sentence(corpus, model.context)
    length = len(ids)
    with model.evaluating():
        weights = torch.stack(_weights(model, ids))  # [layers, heads, T, T]
    distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
    queries, keys = min(QUERIES, length), min(KEYS, length)
    # The position that everything can point at (often the first) is no choice: the median distance ignores it.
    reach = _median_distance(weights[:, :, -queries:], distance[-queries:])  # [layers, heads]
    layer, head = divmod(int(reach.argmax()), weights.shape[1])
    last = weights[layer, head, -queries:]
    shown = last[:, -keys:]
    return ChosenKeys(
        text=corpus.decode(ids[-keys:]),
        layer=layer,
        head=head,
        top_k=model.blocks[0].attention.top_k,
        window=model.blocks[0].attention.window,
        context=length,
        weights=[[round(w, 5) if w > 0 else None for w in row] for row in shown.tolist()],
        outside=round((last.sum() - shown.sum()).item() / queries, 5),
    )


def _end_of_sentence(corpus: Corpus, context: int) -> Tensor:
    """The first `context` held-out characters that end with a line, or simply the first ones."""
    text = corpus.decode(corpus.held_out[: 8 * context])
    end = text.find("\n", context)
    end = context if end < 0 else end
    return corpus.held_out[end - context : end]


def _weights(model: GPT, ids: Tensor) -> list[Tensor]:
    """Per layer the attention weights [heads, T, T], 0 where a key was not chosen."""
    inputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            hook = block.attention.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
            hooks.callback(hook.remove)
        model(ids[None].to(model.positions.device))
    layers = []
    for block, hidden in zip(model.blocks, inputs, strict=True):
        attention = block.attention
        heads = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads  # each [1, heads, T, head_dim]
        _, lse, indices = sparse_attn.topk_attention(
            query,
            key,
            value,
            attention.top_k,
            is_causal=True,
            window=attention.window,
            return_lse=True,
            return_indices=True,
        )
        probability = (query @ key.transpose(-1, -2) * attention.head_dim**-0.5 - lse.unsqueeze(-1)).exp()
        chosen = indices.long()
        # One more column takes the empty slots, and is cut off.
        kept = torch.zeros((*chosen.shape[:3], len(ids) + 1), dtype=torch.bool, device=chosen.device)
        kept.scatter_(-1, chosen.where(chosen >= 0, len(ids)), True)
        layers.append(torch.where(kept[..., :-1], probability, 0.0)[0].cpu())
    return layers


def _median_distance(weights: Tensor, distance: Tensor) -> Tensor:
    """weights [layers, heads, Q, T], distance [Q, T] → the mean over queries of the weighted median distance."""
    by_distance = torch.zeros_like(weights)
    by_distance.scatter_add_(-1, distance.expand_as(weights), weights)
    half = by_distance.cumsum(-1) >= 0.5 * by_distance.sum(-1, keepdim=True)
    return half.float().argmax(-1).float().mean(-1)
