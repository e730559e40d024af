"""Replaces heads of a trained model by KeySelector and HeadApproximator, and trains these on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.distillation.progress import Progress, length_of, reporting
from sparse_attn.distillation.teacher import Heads, attention_layers, keeping_gradients, observe
from sparse_attn.nn import HybridAttention, TopKAttention


def hybridize(
    model: torch.nn.Module,
    approximated_heads: str | Sequence[int] | Mapping[str, Sequence[int]] = "all",
    **options,
) -> torch.nn.Module:
    """A copy of the model whose attention layers are HybridAttention with the model's own weights.

    Args:
        model: has TopKAttention layers; it is not changed.
        approximated_heads: "all"; the same heads in every layer; or heads by the name of the layer, where layers that
            are not named keep all heads exact.
        options: of HybridAttention (max_length, approximated_top_k, approximate_output, hidden, top_k, …).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> from sparse_attn.demo.model import GPT
        >>> from sparse_attn.distillation import hybridize
        >>> teacher = GPT(vocabulary=50, context=64, top_k=None)
        >>> student = hybridize(teacher, [0, 1], max_length=64, approximated_top_k=16)
        >>> student.blocks[1].attention.selector.top_k
        16
    """
    layers = attention_layers(model)
    if isinstance(approximated_heads, Mapping):
        for name in approximated_heads:
            if name not in layers:
                raise ValueError(
                    f"approximated_heads must name layers among {', '.join(layers)}, got {name!r}"
                )
    elif isinstance(approximated_heads, str) and approximated_heads != "all":
        raise ValueError(
            f'approximated_heads must be "all", a sequence or a mapping, got {checks.describe(approximated_heads)}'
        )
    student = copy.deepcopy(model)
    for name, attention in attention_layers(student).items():
        if isinstance(approximated_heads, Mapping):
            heads = approximated_heads.get(name, ())
        else:
            heads = range(attention.num_heads) if approximated_heads == "all" else approximated_heads
        parent, _, child = name.rpartition(".")
        hybrid = HybridAttention.from_attention(attention, approximated_heads=heads, **options)
        setattr(student.get_submodule(parent), child, hybrid)
    return student


def train_selector(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    stream: Iterable[Tensor],
    *,
    learning_rate: float = 1e-2,
    progress: Progress | bool | None = None,
) -> dict[str, list[float]]:
    """Trains the KeySelectors of all layers of `student` on the whole attention rows of the teacher's heads.

    Each batch is one step of Adam for all layers at once. The scores are made in blocks of queries, and a batch is
    forgotten after its step: memory depends on the batch alone.

    Args:
        teacher: the trained model, only read.
        student: of `hybridize(teacher, …)`; its selectors are trained in place.
        stream: batches of token ids, int64 [B, T] with T at most the selectors' max_length. A list or anything else
            with a length lets the learning rate fall linearly to a tenth; a generator keeps it constant.
        learning_rate: of Adam.
        progress: True for a progress bar, or a function called with (name, done, total or None, note) after each step.

    Returns:
        For each layer that has a selector, the loss at each step, in nats: the divergence of the prediction from the
        teacher's row, mean over queries and heads.

    Raises:
        ValueError: the student has no selector, or its layers are not named as the teacher's.
    """

    def losses(hybrid: HybridAttention, heads: Heads) -> Iterator[Tensor]:
        query = _approximated(hybrid, heads)[0]
        chosen = list(hybrid.approximated_heads)
        length = query.shape[2]
        for rows in heads.blocks():
            mass = heads.scores(rows)[:, chosen]
            loss = hybrid.selector.loss(query[:, :, rows], mass, from_scores=True, causal_offset=rows.start)
            yield loss * ((rows.stop - rows.start) / length)

    return _train("selector", teacher, student, stream, losses, learning_rate, progress)


def train_approximator(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    stream: Iterable[Tensor],
    *,
    learning_rate: float = 1e-2,
    progress: Progress | bool | None = None,
) -> dict[str, list[float]]:
    """Trains the HeadApproximators of all layers of `student` on the outputs of the teacher's heads.

    The keys are those that the student's selectors choose, so train these first. The loss is, per head,
    ‖approximation − output‖² / ‖output‖², which gives quiet heads the same say as loud ones; the mean over heads.
    Arguments, memory and returned losses as for :func:`train_selector`.
    """

    def losses(hybrid: HybridAttention, heads: Heads) -> Iterator[Tensor]:
        query, key, value = _approximated(hybrid, heads)
        wanted = heads.output[:, list(hybrid.approximated_heads)]
        error = (hybrid.attend_approximately(query, key, value) - wanted).float().square().sum((0, 2, 3))
        size = wanted.float().square().sum((0, 2, 3))
        yield (error / size.clamp(min=torch.finfo(size.dtype).tiny)).mean()

    return _train("approximator", teacher, student, stream, losses, learning_rate, progress)


def pairs(teacher: torch.nn.Module, student: torch.nn.Module) -> dict[str, TopKAttention]:
    """The student's layers by name, which must be the teacher's names."""
    names, layers = list(attention_layers(teacher)), attention_layers(student)
    if names != list(layers):
        raise ValueError(
            f"student must have the teacher's attention layers {', '.join(names)}, got {', '.join(layers)}"
        )
    return layers


def _train(
    part: str,  # the attribute of HybridAttention that is trained
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    stream: Iterable[Tensor],
    losses: Callable[[HybridAttention, Heads], Iterator[Tensor]],  # that add up to one layer's
    learning_rate: float,
    progress: Progress | bool | None,
) -> dict[str, list[float]]:
    layers = {
        name: layer
        for name, layer in pairs(teacher, student).items()
        if getattr(layer, part, None) is not None
    }
    if not layers:
        raise ValueError(f"a layer of student must have a .{part} to train, got none (see hybridize)")
    parameters = [p for layer in layers.values() for p in getattr(layer, part).parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    total = length_of(stream)
    history: dict[str, list[float]] = {name: [] for name in layers}
    with keeping_gradients(parameters), reporting(f"train {part}", total, progress) as advance:
        for step, ids in enumerate(stream):
            if total:
                optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - 0.9 * step / total)
            seen = observe(teacher, ids, list(layers))
            optimizer.zero_grad()
            for name, layer in layers.items():
                loss = 0.0
                # A backward of its own for each block, so that only one block's intermediates exist at a time.
                for share in losses(layer, seen.layers[name]):
                    share.backward()
                    loss += share.item()
                history[name].append(loss)
            optimizer.step()
            advance(f"loss {sum(values[-1] for values in history.values()) / len(history):.3f}")
    return history


def _approximated(hybrid: HybridAttention, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the heads that the layer approximates."""
    return hybrid.heads_of(hybrid.approximated_heads, heads.query, heads.key, heads.value)
