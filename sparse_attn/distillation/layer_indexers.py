"""Trains an Indexer beside each TopKAttention layer of a teacher; Hugging Face models have `distill_indexers`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.distillation.progress import Progress, length_of, reporting
from sparse_attn.distillation.teacher import attention_layers, observe
from sparse_attn.nn import Indexer


def train_indexers(
    teacher: torch.nn.Module,
    stream: Iterable[Tensor],
    *,
    num_heads: int = 4,
    head_dim: int = 32,
    share: str = "all",
    learning_rate: float = 1e-2,
    progress: Progress | bool | None = None,
) -> dict[str, Indexer]:
    """Trains an indexer for each attention layer on the teacher's attention (:func:`sparse_attn.indexer_loss`).

    Each batch is one step of Adam for all layers at once, and is forgotten after it.

    Args:
        teacher: a model with TopKAttention layers, only read.
        stream: batches of token ids, int64 [B, T]. A list or anything else with a length lets the learning rate fall
            linearly to a tenth; a generator keeps it constant.
        num_heads, head_dim: of an indexer, per group.
        share: "all" (one selection for all heads of a layer) or "kv" (one for each key/value head).
        learning_rate: of Adam.
        progress: True for a progress bar, or a function called with (name, done, total or None, note) after each step.

    Returns:
        the indexers by the names of their layers.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch
        >>> from sparse_attn.demo.model import GPT
        >>> from sparse_attn.distillation import train_indexers
        >>> teacher = GPT(vocabulary=50, context=64, top_k=None)
        >>> list(train_indexers(teacher, [torch.randint(50, (2, 64))], head_dim=16))
        ['blocks.0.attention', 'blocks.1.attention']
    """
    if share not in ("all", "kv"):
        raise ValueError(f"share must be 'all' or 'kv' for indexers, got {share!r}")
    checks.integer("num_heads", num_heads, 1)
    checks.integer("head_dim", head_dim, 1)
    indexers = {}
    for name, layer in attention_layers(teacher).items():
        groups = 1 if share == "all" else layer.num_kv_heads
        where = layer.out.weight.device
        indexers[name] = Indexer(layer.embed_dim, num_heads, head_dim, groups=groups, device=where)
    parameters = [p for indexer in indexers.values() for p in indexer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    total, steps = length_of(stream), 0
    with reporting("train indexers", total, progress) as advance:
        for step, ids in enumerate(stream):
            checks.token_batch("stream must hold", ids)
            if total:
                optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - 0.9 * step / total)
            optimizer.zero_grad()
            losses = []
            for name, heads in observe(teacher, ids).layers.items():
                loss = indexers[name].loss(heads.hidden.float(), heads.query.float(), heads.key.float())
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            steps += 1
            advance(f"loss {sum(losses) / len(losses):.3f}")
    if not steps:
        raise ValueError("stream must have at least one batch, got none")
    return indexers
