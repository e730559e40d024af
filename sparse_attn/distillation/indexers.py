"""Indexers learn from a frozen Hugging Face model which keys its attention weighs most."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.distillation.teacher import keeping_gradients
from sparse_attn.files import read_tensors, refusal
from sparse_attn.integrations.indexers import attention_layers, indexers
from sparse_attn.integrations.refusals import refuse_call
from sparse_attn.integrations.visibility import scores_of
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
    updates: int = 1,
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
    most one layer's training tensors and gradients live at a time, and nothing of size [T, T] does.

    Args:
        model: a transformers decoder with indexers (`sparse_attn.integrations.transformers.add_indexers`).
        batches: token ids, int64 [B, T] each, without padding; one is used per step. When training resumes, those
            of the steps already done are drawn and dropped: give the same stream again.
        steps: how many steps in all.
        top_k: keys that the selecting phase trains on.
        dense_steps: steps over all visible keys before that; None is three quarters of `steps`.
        queries: queries per sequence and update that are trained on, a random run of neighbours; None is all.
        updates: of each layer's indexer per step, each on other queries: at long lengths the frozen model's forward
            costs far more than what is learned from a few of its queries.
        learning_rate: of AdamW, at its height: it rises over the first 20 steps and falls as a cosine.
        checkpoint: a file that the state is kept in, every `save_every` steps and at the end; training goes on
            from it when it is there. Only tensors and plain data are read from it (`weights_only`).
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
    updates = checks.integer("updates", updates, 1)
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
    lessons, layers = _Lessons(found, optimizer, queries, updates), attention_layers(model)
    with (
        keeping_gradients(parameters),
        watching(model, lessons.look, [layers[n] for n in found]) as run,
    ):
        for p in parameters:
            p.requires_grad_()
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
            history.append(loss)
            if progress is not None:
                progress(step + 1, steps, loss)
            if file is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(file, found, optimizer, history)
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
    """Takes over what a checkpoint holds, all of it or nothing; the losses of its steps."""
    what = "checkpoint of these indexers"
    state = read_tensors(file, what)
    if not isinstance(state, dict) or state.keys() != {"indexers", "optimizer", "history"}:
        raise refusal(
            file, what, f"it must have indexers, optimizer and history, got {checks.describe(state)}"
        )
    states, history = state["indexers"], state["history"]
    if not isinstance(states, dict) or set(states) != set(found):
        has = sorted(map(str, states)) if isinstance(states, dict) else checks.describe(states)
        raise refusal(file, what, f"it has those of layers {has}, the model of {sorted(found)}")
    if not isinstance(history, list) or not all(isinstance(loss, float) for loss in history):
        raise refusal(file, what, "its history must be a list of losses")
    try:
        for number, indexer in found.items():
            copy.deepcopy(indexer).load_state_dict(states[number])
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != p.shape:
                    raise ValueError(
                        f"{name} must have shape {list(p.shape)}, got {checks.describe(moments[name])}"
                    )
    except Exception as error:  # of whatever the file holds in the place of these
        raise refusal(file, what, f"{type(error).__name__}: {error}") from None
    for number, indexer in found.items():
        indexer.load_state_dict(states[number])
    return history


class _Lessons:
    """Trains the indexer of each layer that the frozen model passes through."""

    def __init__(
        self, found: dict, optimizer: torch.optim.Optimizer, queries: int | None, updates: int
    ) -> None:
        self.found, self.optimizer, self.queries, self.updates = found, optimizer, queries, updates
        self.losses: dict[int, float] = {}
        self.top_k: int | None = None
        self.generator: torch.Generator | None = None

    def begin(self, top_k: int | None, generator: torch.Generator) -> None:
        self.losses.clear()
        self.top_k, self.generator = top_k, generator

    def look(self, given: Given) -> None:
        layer = given.module.layer_idx
        losses = []
        for _ in range(self.updates):
            losses.append(self._teach(self.found[layer], given))
            # Of this layer alone: the others have no gradients, and the optimizer passes them by.
            torch.nn.utils.clip_grad_norm_(self.found[layer].parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses[layer] = sum(losses) / len(losses)

    def _teach(self, indexer, given: Given) -> float:
        """One layer."""
        refuse_call(given.module, 0.0, given.others)
        query, key = given.query, given.key
        assert given.hidden is not None
        length = given.hidden.shape[1]
        count = length if self.queries is None else min(self.queries, length)
        first = int(torch.randint(length - count + 1, (), generator=self.generator))
        rows = slice(first, first + count)
        last, rule = given.seen.of_rows(rows, query.shape[0])
        scoring = scores_of(given.scale, given.others["softcap"], given.others["s_aux"])
        hidden = given.hidden.detach().to(indexer.key.weight.dtype)
        rope = given.rope
        with torch.enable_grad():
            of_rows, of_keys = (
                None if rope is None else tuple(t[:, s] for t in rope) for s in (rows, slice(last))
            )
            index_query, weights = indexer.queries(hidden[:, rows], of_rows)
            index_key = indexer.keys(hidden[:, :last], of_keys)
            if self.top_k is not None:
                with torch.no_grad():
                    chosen = indexer_select(index_query, index_key, weights, self.top_k, **rule)
                rule = {"indices": chosen}
            loss = indexer_loss(
                index_query,
                index_key,
                weights,
                query[:, :, rows].float(),
                key[:, :, :last].float(),
                **scoring,
                **rule,
            )
            loss.backward()
        return float(loss)
