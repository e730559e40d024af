"""Low-rank scorers beside the attention layers of a Hugging Face model, fitted by one pass over some text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations.indexers import attention_layers, chosen_layers
from sparse_attn.integrations.watching import Given, watching
from sparse_attn.nn import LowRankScorer

ATTRIBUTE = "sparse_attn_low_rank"  # of an attention module: its scorer


def fit_low_rank(
    model: torch.nn.Module,
    batches: Iterable[Tensor],
    *,
    rank: int = 16,
    int8: bool = False,
    layers: Iterable[int] | None = None,
) -> torch.nn.Module:
    """Gives attention layers a :class:`sparse_attn.nn.LowRankScorer` each, fitted on the model's own queries and keys.

    The scorers are part of the model's state dict; selector="low_rank" chooses keys with them.

    Args:
        model: a transformers decoder; it stays as it is.
        batches: token ids, int64 [B, T] each, without padding; a few thousand tokens will do.
        rank: components of queries and keys that are compared.
        int8: compare them rounded to 8 bits.
        layers: which; None is all.

    Returns:
        the model.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message; there is no batch.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import sparse_attn.integrations.transformers as sparse_transformers
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).eval()
        >>> text = torch.randint(100, (1, 64))
        >>> model = sparse_transformers.fit_low_rank(model, [text], rank=4)
        >>> model = sparse_transformers.configure(model, top_k=16, selector="low_rank")
        >>> model(text).logits.shape
        torch.Size([1, 64, 100])
    """
    rank = checks.integer("rank", rank, 1)
    found = attention_layers(model)
    chosen = chosen_layers(found, layers)
    scorers: dict[int, LowRankScorer] = {}

    def look(given: Given) -> None:
        layer = given.module.layer_idx
        if layer not in scorers:
            _, heads, _, width = given.key.shape
            scorers[layer] = LowRankScorer(heads, width, rank, int8=int8).to(given.key.device)
        scorers[layer].calibrate(given.query.float(), given.key.float())

    with watching(model, look, [found[n] for n in chosen]) as run:
        for tokens in batches:
            run(tokens)
    if not scorers:
        raise ValueError("batches must hold at least one batch of token ids, got none")
    for scorer in scorers.values():
        scorer.fit()
    for layer, scorer in scorers.items():  # all of them or, where one cannot be fitted, none
        setattr(found[layer], ATTRIBUTE, scorer)
    return model


def require_low_rank(model: torch.nn.Module, layers: Iterable[int] | None) -> None:
    """That every layer which is to use a scorer has one."""
    found = attention_layers(model)
    for number in found if layers is None else layers:
        low_rank_of(found.get(number), number)


def low_rank_of(module: torch.nn.Module | None, layer: int) -> LowRankScorer:
    if not hasattr(module, ATTRIBUTE):
        raise ValueError(f"selector='low_rank' needs a scorer in layer {layer}: fit_low_rank gives it one")
    return getattr(module, ATTRIBUTE)
