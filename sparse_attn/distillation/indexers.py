"""Indexers learn from a frozen Hugging Face model which keys its attention weighs most."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations.indexers import attention_layers, indexers
from sparse_attn.integrations.watching import Given, watching
from sparse_attn.ops.indexer_loss import indexer_loss
from sparse_attn.ops.indexer_select import indexer_select


def distill_indexers(
    model: torch.nn.Module,
    batches: Iterable[Tensor],
    steps: int,
    *,
    top_k: int = 256,
    dense_steps: int | None = None,
    queries: int | None = None,
    learning_rate: float = 2e-3,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 50,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    r"""Trains the indexers of `model` on its own attention; the model itself stays as it is.

    Each layer's indexer learns to minimise the KL divergence from the attention mass of its layer, the mean of the
    heads' softmax, to the softmax of its scores (:func:`sparse_attn.indexer_loss`): first over all visible keys, then
    over the keys that it selects itself. A layer's gradients are made while the frozen model passes through it, so at
    most one layer's training tensors live at a time, and nothing of size [T, T] does.

    Args:
        model: a transformers decoder with indexers (`sparse_attn.integrations.transformers.add_indexers`).
        batches: token ids, int64 [B, T] each, without padding; one is used per step. When training resumes, those
            of the steps already done are drawn and dropped: give the same stream again.
        steps: how many steps in all.
        top_k: keys that the selecting phase trains on.
        dense_steps: steps over all visible keys before that; None is three quarters of `steps`.
        queries: queries per sequence and step that are trained on, a random run of neighbours; None is all.
        learning_rate: of AdamW, at its height: it rises over the first 20 steps and falls as a cosine.
        checkpoint: a file that the state is kept in, every `save_every` steps and at the end; training goes on
            from it when it is there.
        seed: of the choice of queries.
        progress: called after each step with (steps done, steps, mean loss of the layers in nats).

    Returns:
        the mean loss of the layers at each step, in nats.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message; the stream ended early.

    Source: DeepSeek-AI, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention" (2025).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import sparse_attn.integrations.transformers as sparse_transformers
        >>> from sparse_attn.distillation import distill_indexers
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).eval()
        >>> model = sparse_transformers.add_indexers(model, num_heads=2, head_dim=8)
        >>> stream = (torch.randint(100, (2, 64)) for _ in range(4))
        >>> len(distill_indexers(model, stream, steps=4, top_k=16))
        4
    """
    steps = checks.integer("steps", steps, 1)
    top_k = checks.integer("top_k", top_k, 1)
    dense_steps = -(-3 * steps // 4) if dense_steps is None else checks.integer("dense_steps", dense_steps, 0)
    queries = queries if queries is None else checks.integer("queries", queries, 1)
    save_every = checks.integer("save_every", save_every, 1)
    found = indexers(model)
    if not found:
        raise ValueError("model has no indexers to train: add_indexers adds them")
    parameters = [p for indexer in found.values() for p in indexer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history: list[float] = []
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None and file.exists():
        history = _resume(file, found, optimizer)
    stream = iter(batches)
    for p in parameters:
        p.requires_grad_()
    try:
        lessons, layers = _Lessons(found, queries), attention_layers(model)
        with watching(model, lessons.look, [layers[n] for n in found]) as run:
            for step in range(steps):
                tokens = next(stream, None)
                if tokens is None:
                    raise ValueError(f"batches must hold one batch per step, {steps}, got {step}")
                if step < len(history):
                    continue  # done before the checkpoint
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _schedule(step, steps)
                optimizer.zero_grad(set_to_none=True)
                # Seeded by step: a resumed training draws what an uninterrupted one would have.
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                lessons.begin(None if step < dense_steps else top_k, generator)
                run(tokens)
                loss = sum(lessons.losses.values()) / len(lessons.losses)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0 * len(found))
                optimizer.step()
                history.append(loss)
                if progress is not None:
                    progress(step + 1, steps, loss)
                if file is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                    _save(file, found, optimizer, history)
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    return history


def _schedule(step: int, steps: int) -> float:
    rise = min(20, max(1, steps // 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _save(file: Path, found: dict, optimizer: torch.optim.Optimizer, history: list[float]) -> None:
    state = {
        "indexers": {n: indexer.state_dict() for n, indexer in found.items()},
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    fresh = file.with_suffix(file.suffix + ".new")
    torch.save(state, fresh)
    fresh.replace(file)  # in one step: an interruption leaves the old checkpoint or the new one, whole


def _resume(file: Path, found: dict, optimizer: torch.optim.Optimizer) -> list[float]:
    state = torch.load(file, weights_only=True)
    if set(state["indexers"]) != set(found):
        raise ValueError(
            f"checkpoint {file} has indexers of layers {sorted(state['indexers'])}, the model of {sorted(found)}"
        )
    for number, indexer in found.items():
        try:
            indexer.load_state_dict(state["indexers"][number])
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint {file} does not fit the indexer of layer {number}: {text}"
            ) from None
    optimizer.load_state_dict(state["optimizer"])
    return list(state["history"])


class _Lessons:
    """Trains the indexer of each layer that the frozen model passes through."""

    def __init__(self, found: dict, queries: int | None) -> None:
        self.found, self.queries = found, queries
        self.losses: dict[int, float] = {}
        self.top_k: int | None = None
        self.generator: torch.Generator | None = None

    def begin(self, top_k: int | None, generator: torch.Generator) -> None:
        self.losses.clear()
        self.top_k, self.generator = top_k, generator

    def look(self, given: Given) -> None:
        layer = given.module.layer_idx
        self.losses[layer] = self._teach(
            self.found[layer], given.hidden, given.rope, given.query, given.key, given.scale
        )

    def _teach(self, indexer, hidden, rope, query, key, scale) -> float:
        """One layer: hidden [B, T, C], query [B, Hq, T, D], key [B, Hkv, T, D]."""
        length = hidden.shape[1]
        count = length if self.queries is None else min(self.queries, length)
        first = int(torch.randint(length - count + 1, (), generator=self.generator))
        last = first + count
        hidden = hidden[:, :last].detach().to(indexer.key.weight.dtype)
        rope = None if rope is None else tuple(t[:, :last] for t in rope)
        with torch.enable_grad():
            own_rope = None if rope is None else tuple(t[:, first:] for t in rope)
            index_query, weights = indexer.queries(hidden[:, first:], own_rope)
            index_key = indexer.keys(hidden, rope)
            rule = {"is_causal": True, "causal_offset": first}
            if self.top_k is not None:
                with torch.no_grad():
                    chosen = indexer_select(index_query, index_key, weights, self.top_k, **rule)
                rule = {"indices": chosen}
            loss = indexer_loss(
                index_query,
                index_key,
                weights,
                query[:, :, first:last].float(),
                key[:, :, :last].float(),
                scale=scale,
                **rule,
            )
            loss.backward()
        return float(loss)
