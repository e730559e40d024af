"""The selectors of a Hugging Face model: by the name that stands in its config, or an object of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sparse_attn.integrations.indexers import require_indexers
from sparse_attn.integrations.low_rank import low_rank_of, require_low_rank
from sparse_attn.integrations.options import kept
from sparse_attn.selection import Blocks, Exact, FromIndexer, LowRank, Refined, Rounded, Selector
from sparse_attn.selection.selection import check_selector

OWN = "own"  # the name of a selector that is an object
_ATTRIBUTE = "_sparse_attn_selector"  # of a model's modules: that object
BLOCK = 64  # keys per block, and queries that share a choice of blocks


class _Named(NamedTuple):
    """One name: the selector of a layer's call, and what must hold before a model may use it."""

    of: Callable[[torch.nn.Module, dict, FromIndexer | None], Selector]  # (module, options, its index)
    check: Callable[[torch.nn.Module, int | None, dict[str, int], Iterable[int] | None], None] | None = None


def _check_blocks(model, top_k: int | None, kept: dict[str, int], layers) -> None:
    if top_k is not None and (top_k % BLOCK or top_k < 3 * BLOCK):
        raise ValueError(
            f"selector='blocks' needs a top_k that is a multiple of {BLOCK}, at least {3 * BLOCK}, got {top_k}"
        )
    if any(kept.values()):
        raise ValueError(
            f"selector='blocks' keeps the first block and the queries' own, {' and '.join(kept)} go without, "
            f"got {', '.join(f'{name}={value}' for name, value in kept.items())}"
        )


_NAMED = {
    "exact": _Named(lambda module, options, index: Exact(options["backend"])),
    "int8": _Named(lambda module, options, index: Rounded(backend=options["backend"])),
    "low_rank": _Named(
        lambda module, options, index: LowRank(low_rank_of(module, module.layer_idx), options["backend"]),
        lambda model, top_k, kept, layers: require_low_rank(model, layers),
    ),
    "indexer": _Named(
        lambda module, options, index: replace(index, backend=options["backend"]),
        lambda model, top_k, kept, layers: require_indexers(model, layers),
    ),
    "blocks": _Named(
        lambda module, options, index: Blocks(BLOCK, BLOCK, backend=options["backend"]), _check_blocks
    ),
    "refined_blocks": _Named(
        lambda module, options, index: Refined(4, Blocks(BLOCK, BLOCK, backend=options["backend"])),
        _check_blocks,
    ),
}
SELECTORS = tuple(_NAMED)


def check_named(model: torch.nn.Module, selector: Any, options: dict[str, Any]) -> None:
    """That `selector` is a name that this model has what it needs for, or an object that can select."""
    if not isinstance(selector, str):
        check_selector(selector)
        return
    if selector not in _NAMED:
        raise ValueError(
            f"selector must be one of {', '.join(map(repr, SELECTORS))} or an object with a method select, "
            f"got {selector!r}"
        )
    check = _NAMED[selector].check
    if check is not None:
        groups = options["reuse"]
        layers = options["layers"] if groups is None else [group[0] for group in groups]
        check(model, options["top_k"], kept(options), layers)


def remember(model: torch.nn.Module, selector: Selector) -> None:
    """Leaves an object with the model's modules; not as a submodule: it is no part of the model's state."""
    for module in model.modules():
        if hasattr(module, "config"):
            object.__setattr__(module, _ATTRIBUTE, selector)


def selector_of(module: torch.nn.Module, options: dict[str, Any], index: FromIndexer | None) -> Selector:
    """What chooses keys in an attention module; `index` is what its indexer made of this call."""
    name = options["selector"]
    if name == OWN:
        if not hasattr(module, _ATTRIBUTE):
            raise ValueError(
                "config.sparse_attn_selector is 'own', an object that is not saved with a model: pass it again with "
                "sparse_attn.integrations.transformers.configure(model, top_k=…, selector=…)"
            )
        return getattr(module, _ATTRIBUTE)
    if name not in _NAMED:
        raise ValueError(
            f"config.sparse_attn_selector must be one of {', '.join(map(repr, SELECTORS))}, got {name!r}"
        )
    if name in ("blocks", "refined_blocks"):
        _check_blocks(None, options["top_k"], kept(options), None)
    return _NAMED[name].of(module, options, index)
