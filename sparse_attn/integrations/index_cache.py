"""Index keys beside the layers of a key/value cache: whatever happens to a layer's keys happens to them, too.

They stand in the layer of the cache itself, with methods that take them along: what a cache does with its layers (beam
search, a cut, a batch repeated) they follow, and copies and pickles of a cache have index keys of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_KEYS = "sparse_attn_index_keys"  # of a layer: [B, G, keys so far, Di]


# What a layer's method with these arguments does with its index keys; None: there are none any more.
_CHANGES: dict[str, Callable[..., Tensor | None]] = {
    "reorder_cache": lambda layer, key, order: key.index_select(0, order.to(key.device)),
    "batch_repeat_interleave": lambda layer, key, repeats: key.repeat_interleave(repeats, dim=0),
    "batch_select_indices": lambda layer, key, rows: key[rows],
    "crop": lambda layer, key, *_: key[:, :, : int(layer.get_seq_length())],
    "reset": lambda layer, key: None,
}


class _Following:
    """A method of one layer, done with its index keys as well.

    An object, not a closure: a copy of the layer has one that speaks of the copy.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name

    def __call__(self, *arguments: Any, **named: Any) -> None:
        layer = self.layer
        getattr(type(layer), self.name)(layer, *arguments, **named)
        key = layer.__dict__.pop(_KEYS, None)
        if key is not None:
            key = _CHANGES[self.name](layer, key, *arguments, *named.values())
        if key is not None:
            setattr(layer, _KEYS, key)


def cache_among(given: Iterable[object]) -> Any:
    """The key/value cache of a call, by its type: the argument's name is another since transformers 5.24."""
    from transformers.cache_utils import Cache

    return next((value for value in given if isinstance(value, Cache)), None)


def with_those_before(past: Any, number: int, key: Tensor) -> Tensor:
    """`key` [B, G, t, Di] behind the index keys of layer `number`, which must be as many as its keys."""
    length = int(past.get_seq_length(number))  # before this call's keys are added
    before = getattr(past.layers[number], _KEYS, None) if number < len(past.layers) else None
    known = 0 if before is None else before.shape[2]
    if known < length:
        raise ValueError(
            f"the cache holds {length} keys of layer {number} but only {known} index keys: "
            "with selector='indexer' it must be filled by the model with its indexers from the start"
        )
    if before is None or not length:
        return key
    return torch.cat((before[:, :, :length], key), dim=2)  # a call that failed may have left more


def keep(past: Any, number: int, key: Tensor) -> None:
    """Puts all index keys of layer `number` beside its keys."""
    layer = past.layers[number]
    if not hasattr(layer, _KEYS):
        for name in _CHANGES:
            if hasattr(type(layer), name):
                setattr(layer, name, _Following(layer, name))
    setattr(layer, _KEYS, key)


def forget(past: Any, number: int) -> None:
    """Of a layer that goes on without its indexer."""
    if number < len(getattr(past, "layers", ())):
        past.layers[number].__dict__.pop(_KEYS, None)
