"""What a Hugging Face model cannot do with this attention: whatever would be ignored silently is an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations.options import UNKNOWN, configs_of
from sparse_attn.integrations.visibility import Visibility, holds, holes
from sparse_attn.selection import FromIndexer


class Refused(ValueError):
    """A refusal of ours, told from what a model raises."""


def refuse_no_model(model: torch.nn.Module) -> None:
    if not configs_of(model) or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model (it has no config), got {type(model).__name__}")


def refuse_unreachable(model: torch.nn.Module, meant: Iterable[str]) -> None:
    """Layers, by name, of a model or a part of one that calls an attention of its own."""
    modules = dict(model.named_modules())
    for layer in meant:
        above = [modules[layer[:at]] for at in range(len(layer)) if layer[:at] in modules]
        parts = [m for m in above if hasattr(m, "_can_set_attn_implementation")]
        if parts and not parts[-1]._can_set_attn_implementation():
            raise ValueError(
                f"layer {layer}: {type(parts[-1]).__name__} does not call its attention through transformers' "
                "attention interface, so sparse_attn cannot take its place; docs/huggingface.md lists models that do"
            )


def refuse_call(module: torch.nn.Module, dropout: float, others: dict[str, Any]) -> None:
    """What a layer asks for at its call."""
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise ValueError(
                f"attn_implementation='sparse_attn' has no {name}, which {type(module).__name__} needs"
            )
    if dropout:
        raise ValueError(
            f"attn_implementation='sparse_attn' has no attention dropout, got dropout={dropout}: "
            "set the model's attention_dropout to 0"
        )


def refuse_unordered(seen: Visibility, options: dict[str, Any]) -> None:
    """Options that need to know which key is a query's own."""
    if seen.ordered:
        return
    said = next((f"{n}={options[n]!r}" for n in ("window", "residual") if options[n]), None)
    raise ValueError(
        f"{said or 'selector=' + repr(options['selector'])} needs causal attention, where a query's own key is the "
        "last that it sees, which is not so here: leave it out, or leave such layers out with layers=…"
    )


def without_padding_behind(seen: Visibility) -> Visibility:
    """For selections that take no mask: what a query sees is a range of keys.

    Padding behind a sequence is in the future of all its queries, and what padded queries see is of no interest.
    """
    if seen.mask is not None:
        raise ValueError(
            "selector='blocks' and residual=True take plain causal attention with padding at the ends of a sequence; "
            "this model's layers have another mask (a sliding window, a prefix, one of your own): "
            "leave such layers out with layers=…"
        )
    if seen.padding is None:
        return seen
    said = "selector='blocks' and residual=True take padding at the ends of a sequence, got some within"
    if not holds(~holes(seen.padding), said):
        raise ValueError(said)
    return replace(seen, padding=None)


def refuse_sharded(
    module: torch.nn.Module, query: Tensor, options: dict[str, Any], index: FromIndexer | None, selector: Any
) -> None:
    """Selections of all heads where tensor parallelism has left this rank some of them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    heads, all_heads = query.shape[1], getattr(module.config, "num_attention_heads", query.shape[1])
    if heads >= all_heads:
        return
    if index is not None:
        if index.key.shape[1] > 1:
            raise ValueError(
                "tensor parallelism has split the heads, and indexers with share='kv' choose for all of them: "
                "add_indexers(share='all')"
            )
    elif options["selector"] == "low_rank":
        raise ValueError(
            "tensor parallelism has split the heads, and selector='low_rank' has components for all of them: "
            "selector='exact'"
        )
    elif options["share"] == "all" and not getattr(selector, "across_ranks", False):
        raise ValueError(
            f"share='all' needs all heads in one place, and tensor parallelism has left {heads} of {all_heads} here: "
            "share='kv' or 'none', or selector=sparse_attn.distributed.AcrossRanks(group)"
        )
