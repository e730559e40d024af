"""What a trained model's attention layers compute for a batch of tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn import TopKAttention
from sparse_attn.wings.reference.chunks import query_chunks


@dataclass(frozen=True)
class Heads:
    """One attention layer on one batch, all detached."""

    hidden: Tensor  # [B, T, C], what went in
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, Hkv, T, D]
    value: Tensor  # [B, Hkv, T, D]
    output: Tensor  # [B, H, T, D], of the heads, before the output projection
    result: Tensor  # [B, T, C], after it

    def blocks(self) -> Iterator[slice]:
        """Slices of the queries, for which `scores` is small however long the text is."""
        batch, heads, length = self.query.shape[:3]
        return query_chunks(length, batch * heads * length)

    def scores(self, rows: slice) -> Tensor:
        """Scores of a block of queries, float32 [B, H, t, T], −inf at keys after the query.

        They are those of dense attention: a teacher with a top_k of its own attends to the best of them alone.
        """
        batch, heads, length, head_dim = self.query.shape
        key = self.key.repeat_interleave(heads // self.key.shape[1], dim=1).float()
        scores = self.query[:, :, rows].float() @ key.transpose(-1, -2) / math.sqrt(head_dim)
        positions = torch.arange(length, device=scores.device)
        return scores.masked_fill(positions > positions[rows].unsqueeze(1), -torch.inf)


@dataclass(frozen=True)
class Observation:
    """One batch: its tokens, the model's logits, and its attention layers by name."""

    ids: Tensor  # int64 [B, T]
    logits: Tensor  # [B, T, V]
    layers: dict[str, Heads]


def attention_layers(model: torch.nn.Module) -> dict[str, TopKAttention]:
    """The model's TopKAttention modules (HybridAttention is one too) by their names, in the model's order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TopKAttention)}
    if not layers:
        raise ValueError(
            f"model must have attention modules of class sparse_attn.nn.TopKAttention, got {type(model).__name__} "
            "without any"
        )
    for name, layer in layers.items():
        if layer.softcap is not None or layer.sink_logits is not None:
            raise ValueError(
                f"attention modules must have a plain softmax, got {name} with softcap or sink_logits"
            )
    return layers


@torch.no_grad()
def observe(model: torch.nn.Module, ids: Tensor, layers: Sequence[str] | None = None) -> Observation:
    """Runs the model once, in evaluation mode, and notes what its attention layers do.

    Args:
        model: called with ids; returns logits [B, T, V] or an object that has them as `.logits`.
        ids: int64 [B, T], moved to the model's device.
        layers: names of the attention layers to note; None means all.

    Raises:
        ValueError: the model has no such layer.

    Example:
        >>> import torch
        >>> from sparse_attn.demo.model import GPT
        >>> from sparse_attn.distillation import observe
        >>> seen = observe(GPT(vocabulary=50, context=64, top_k=None), torch.randint(50, (2, 64)))
        >>> list(seen.layers), seen.layers["blocks.0.attention"].query.shape
        (['blocks.0.attention', 'blocks.1.attention'], torch.Size([2, 4, 64, 32]))
    """
    modules = attention_layers(model)
    names = list(modules) if layers is None else list(layers)
    for name in names:
        if name not in modules:
            raise ValueError(f"layers must be among {', '.join(modules)}, got {name!r}")
    noted: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    with evaluating(model), contextlib.ExitStack() as hooks:
        for name in names:
            for handle in _hooks(modules[name], noted[name]):
                hooks.callback(handle.remove)
        logits = logits_of(model, ids.to(next(model.parameters()).device))
    return Observation(ids, logits, {name: Heads(**tensors) for name, tensors in noted.items()})


def collect(
    model: torch.nn.Module, stream: Iterable[Tensor], layers: Sequence[str] | None = None
) -> Iterator[Observation]:
    """`observe` for each batch of token ids [B, T] of the stream; nothing is kept from one to the next."""
    for ids in stream:
        yield observe(model, ids, layers)


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """ids int64 [B, T] → logits [B, T, V]."""
    output = model(ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TypeError(
            f"model must return logits [B, T, V] or have them as .logits, got {checks.describe(output)}"
        )
    return logits


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def keeping_gradients(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """What trains parameters inside; afterwards each has its gradient, and wants one or not, as before."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p, _, _ in before:
            p.grad = None
        yield
    finally:
        for p, wanted, grad in before:
            p.requires_grad_(wanted)
            p.grad = grad


def _hooks(attention: TopKAttention, noted: dict[str, Tensor]) -> list:
    """Hooks that put what Heads holds into `noted`."""

    def given(module, args):
        noted["hidden"] = args[0]

    def projected(name):
        def note(module, args, output):
            noted[name] = output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        return note

    def attended(module, args):
        noted["output"] = args[0].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    def done(module, args, output):
        noted["result"] = output

    return [
        attention.register_forward_pre_hook(given),
        *(part.register_forward_hook(projected(name)) for name, part in attention.qkv.named_children()),
        attention.out.register_forward_pre_hook(attended),
        attention.register_forward_hook(done),
    ]
