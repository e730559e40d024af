"""A `KeyIndex` beside each layer of a key/value cache: decoding by exact selection reads a fraction of its keys.

An index must be that of just these keys, so it is kept for those caches alone whose way of growing is known, and
only as long as all that happened to their keys is known too: the tensor that a layer holds is the one that was seen
last, not changed in place since (torch counts that). A crop is seen as a view of the same memory; `generate` says how
its beams are reordered. After anything else there is none, until a call goes on from the keys that the last one left.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as once
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.integrations.calls import OfThisCall
from sparse_attn.integrations.self_test import attention_modules
from sparse_attn.ops.key_index import MOST_QUERIES, KeyIndex, append_known
from sparse_attn.ops.topk_attention import OP

LEAST_KEYS = 1024  # of fewer, all scores cost no more than an index
_before = OfThisCall("_sparse_attn_caches")  # what the layers of its cache held before the call
_FOLLOWS = "_sparse_attn_follows_cache"
_REORDER = "_reorder_cache"  # of a model: what generate() reorders its beams with


class Keys(NamedTuple):
    """What a layer of a cache holds at some moment."""

    memory: weakref.ref  # of the tensor that the keys lie in
    version: int  # of that memory: each change in place makes another
    place: tuple[int, ...]  # the offset in it, sizes but the length, strides
    length: int

    def begins(self, other: Keys) -> bool:
        """Whether these keys are the first of the other ones, or all."""
        memory = self.memory()
        same = memory is not None and memory is other.memory() and self.version == other.version
        return same and self.place == other.place and self.length <= other.length


@dataclass
class _Kept:
    """Of one layer, after a call."""

    keys: Keys
    known: int  # keys that the call was given
    index: KeyIndex | None = None  # of these


_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


class _Given(NamedTuple):
    """A layer of the cache that a call is given."""

    layer: weakref.ref
    keys: Keys | None  # before the call's own are added
    goes_on: bool  # these are the keys that the last call ended with, or the first of them


def follow(model: torch.nn.Module) -> None:
    """Lets indices follow a model from its first call on, and the beams of its `generate`."""
    for module in attention_modules(model).values():
        _show(module)
    if not hasattr(model, _REORDER):
        object.__setattr__(model, _REORDER, reorder_cache)


def _show(module: torch.nn.Module) -> None:
    """From the next call on `module` shows the cache that it is given."""
    if _FOLLOWS not in module.__dict__:
        object.__setattr__(module, _FOLLOWS, True)
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)


def reorder_cache(cache: Any, beam_idx: Tensor) -> Any:
    """What `generate` does with a cache after each step of a beam search, done with the indices beside it."""
    own = _caches().CacheLayerMixin.reorder_cache
    followed: list[tuple[Any, _Kept]] = []
    for layer in (layer for layers in _layers(cache) for layer in layers):
        kept, now = _kept.get(layer), _keys_of(layer)
        by_class = type(layer).reorder_cache is own
        same = (
            kept is not None and now is not None and now.begins(kept.keys) and now.length == kept.keys.length
        )
        if same and kept is not None and by_class and _by_its_class(layer, "reorder_cache"):
            followed.append((layer, kept))
    cache.reorder_cache(beam_idx)
    for layer, kept in followed:
        now = _keys_of(layer)
        if now is not None and now.length == kept.keys.length:
            kept.keys = now
            if kept.index is not None:
                kept.index.reorder(beam_idx.to(kept.index.codes.device))
    return cache


def index_of(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D], as the attention function was given it
    options: dict[str, Any],
) -> KeyIndex | None:
    """The index of `key`, or of its first keys: those that a static cache has so far.

    It is brought up to date on the way, or begun where that will pay.
    """
    if torch.compiler.is_compiling() or query.device.type != "cpu" or not _by_score(options):
        return None
    _show(module)
    for reference, before, goes_on in _before.take(module, ()):
        layer = reference()
        call = _call_of(layer, key, before)
        if call is None:
            continue
        kept = _kept.get(layer)
        if kept is None or before is None or not goes_on:
            _kept[layer] = _Kept(*call)
            return None
        kept.keys, kept.known = call
        few = query.shape[2] <= MOST_QUERIES
        if kept.index is not None:
            if kept.index.length != before.length:
                kept.index.crop(before.length)
            append_known(kept.index, key.narrow(2, before.length, kept.known - before.length), "cpu")
        elif few and kept.known >= LEAST_KEYS and OP.choose(query, options["backend"]) == "cpu":
            kept.index = KeyIndex.of(key[:, :, : kept.known], capacity=kept.known + max(256, kept.known // 4))
        return kept.index if few else None
    return None


def _by_score(options: dict[str, Any]) -> bool:
    """Whether keys are chosen by what an index knows."""
    exact = options["selector"] == "exact" and not options["residual"] and options["share"] == "none"
    return bool(options["key_index"] and exact)


def _before_attention(module: torch.nn.Module, arguments: tuple, named: dict) -> None:
    """A forward pre-hook: attention functions are not given the cache, and see its keys only with the new ones."""
    if torch.compiler.is_compiling():
        return
    number, kind = getattr(module, "layer_idx", None), _caches().Cache
    caches = [value for value in (*named.values(), *arguments) if isinstance(value, kind)]
    held = [layers for cache in caches for layers in _layers(cache)] if isinstance(number, int) else []
    layers = [layers[number] for layers in held if 0 <= number < len(layers)]
    _before.put(module, [_given(layer) for layer in layers if _grows(layer) is not None])


def _given(layer: Any) -> _Given:
    now, kept = _keys_of(layer), _kept.get(layer)
    # Of a sliding layer that has let go of some an index would begin with keys that are gone.
    goes_on = (
        kept is not None and kept.known == kept.keys.length and now is not None and now.begins(kept.keys)
    )
    if not goes_on:
        _kept.pop(layer, None)
    return _Given(weakref.ref(layer), now, goes_on)


@once
def _caches() -> ModuleType:
    from transformers import cache_utils

    return cache_utils


@once
def _ways() -> dict[Callable, str]:
    """How a layer adds keys by its method: to a new tensor of all of them, or in place."""
    caches = _caches()
    anew = (caches.DynamicLayer.update, caches.DynamicSlidingWindowLayer.update)
    return {**dict.fromkeys(anew, "anew"), caches.StaticLayer.update: "in place"}


def _layers(cache: Any) -> Iterator[Sequence[Any]]:
    """The layers of a cache, or of each of the two of an encoder-decoder's."""
    if isinstance(cache, _caches().EncoderDecoderCache):
        yield from _layers(cache.self_attention_cache)
        yield from _layers(cache.cross_attention_cache)
    elif type(cache).update is _caches().Cache.update and _by_its_class(cache, "update", "reorder_cache"):
        yield cache.layers


def _by_its_class(thing: Any, *methods: str) -> bool:
    return not any(method in thing.__dict__ for method in methods)


def _grows(layer: Any) -> str | None:
    """How a layer adds keys, where that is known."""
    own = vars(layer)
    way = None if "update" in own else _ways().get(getattr(type(layer), "update", None))
    return None if way == "in place" and "cumulative_length" not in own else way


def _keys_of(layer: Any) -> Keys | None:
    """None: it has none, or nobody could see a change of them."""
    way = _grows(layer)
    keys = None if way is None else layer.keys
    if not isinstance(keys, Tensor) or keys.dim() != 4 or keys.device.type != "cpu" or keys.is_inference():
        return None
    base, (batch, heads, length, dim) = keys._base, keys.shape
    memory = keys if base is None else base
    place = keys.storage_offset(), batch, heads, dim, *keys.stride()
    length = length if way == "anew" else int(layer.cumulative_length)
    return Keys(weakref.ref(memory), memory._version, place, length)


def _call_of(layer: Any, key: Tensor, before: Keys | None) -> tuple[Keys, int] | None:
    """(what a layer holds, how many keys of `key` there are) where `key` is what the layer gave out; else None."""
    now = None if layer is None else _keys_of(layer)
    if now is None:
        return None
    if _grows(layer) == "in place":
        # Its update makes one change; a layer that only lends its keys has none.
        changes = 0 if before is None else now.version - before.version - (now.length > before.length)
        return (now, now.length) if layer.keys is key and changes == 0 else None
    # A new tensor that nobody has changed, or, of a layer that only lends its keys, the old one.
    lent = before is not None and before.begins(now) and before.length == now.length
    if now.version != 0 and not lent:
        return None
    # A sliding layer keeps the last keys of those that it gives out.
    held, behind = layer.keys, key.shape[2] - layer.keys.shape[2]
    there = key.data_ptr() + behind * key.stride(2) * key.element_size() == held.data_ptr()
    alike = (
        key.stride() == held.stride() and key.shape[:2] == held.shape[:2] and key.shape[3] == held.shape[3]
    )
    return (now, key.shape[2]) if behind >= 0 and there and alike else None
