"""One selection for several layers: the first of a group selects, those behind it attend to what it chose.

`configure` writes the groups into the config (`sparse_attn_reuse`, lists of numbers of layers). A selection lives from
the first layer of its group to the last, in one forward of one thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.rule import Rule
from sparse_attn.selection import Exact, FromIndexer, Selection, Selector

_ATTRIBUTE = "_sparse_attn_chosen"  # of a config, within a graph
Groups = list[list[int]]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the first layer of a group left for the others. A selector, too: it chooses just this."""

    selection: Selection
    turn: Turn  # of the layer that chose
    known: int | None  # keys that its indexer knew, where one chose

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        return self.selection


class _Leaving:
    """A selector that leaves what it chose for the layers behind."""

    def __init__(self, selector: Selector, leave: Callable[[Selection], None]) -> None:
        self.selector, self.leave = selector, leave

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        chosen = self.selector.select(query, key, top_k, rule)
        self.leave(chosen)
        return chosen


class _LeavingExact(_Leaving):
    """The same where both stages are one op."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, top_k: int, rule: Rule) -> tuple[Tensor, ...]:
        assert isinstance(self.selector, Exact)
        found = self.selector.attend(query, key, value, top_k, rule)
        self.leave(Selection(found[2]))
        return found


@dataclass(frozen=True)
class Turn:
    """What a layer has to do with the selection of its group."""

    module: torch.nn.Module
    group: list[int]
    mask: Any  # what the layer was given as its attention_mask
    query_shape: tuple[int, ...]  # B, Hq, Tq, D
    key_shape: tuple[int, ...]  # B, Hkv, Tk, D

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, Tq, Tk."""
        return self.query_shape[0], self.query_shape[2], self.key_shape[2]

    @property
    def heads(self) -> tuple[int, int]:
        """Hq, Hkv."""
        return self.query_shape[1], self.key_shape[1]

    @property
    def selects(self) -> bool:
        return self.module.layer_idx == self.group[0]

    def leaving(self, selector: Selector, known: int | None) -> Selector:
        """`selector`, which will leave its selection for the rest of the group."""
        kind = _LeavingExact if isinstance(selector, Exact) else _Leaving
        return kind(selector, lambda selection: self.leave(selection, known))

    def leave(self, selection: Selection, known: int | None = None) -> None:
        _put(self.module.config, self.group[0], Chosen(selection, self, known))

    def chosen(self) -> Chosen:
        """The selection of the group's first layer.

        Raises:
            ValueError: it is not of these queries and keys, or there is none.
        """
        number, first = self.module.layer_idx, self.group[0]
        found = _take(self.module.config, first, last=number == self.group[-1])
        if found is None:
            raise ValueError(
                f"layer {number} reuses the selection of layer {first}, which has made none in this call: layers that "
                "run alone or anew (gradient checkpointing, pipelines) take reuse=1"
            )
        theirs, indices = found.turn, found.selection.indices
        if theirs.sizes != self.sizes or theirs.mask is not self.mask:
            raise ValueError(
                f"layer {number} cannot reuse the selection of layer {first}: it sees other keys (a sliding window, "
                "another cache or mask); leave such layers out with layers=…"
            )
        # [B, G, Tq, K], of documents [tiles, G, M], of a selector of one's own maybe [B, Tq, K].
        alone = indices.dim() == 3 and found.selection.block_size is None
        if theirs.heads != self.heads and indices.shape[1] > 1 and not alone:
            raise ValueError(
                f"layer {number} cannot reuse the selection of layer {first}: it has {self.heads[0]} query and "
                f"{self.heads[1]} key heads, the other {theirs.heads[0]} and {theirs.heads[1]}: share='all'"
            )
        return found


def known_of(selector: Selector) -> int | None:
    """How many keys an indexer knew, where one chooses or has chosen."""
    if isinstance(selector, FromIndexer):
        return selector.key.shape[2]
    return selector.known if isinstance(selector, Chosen) else None


def turn_of(
    module: torch.nn.Module, options: dict[str, Any], mask: Any, query: Tensor, key: Tensor
) -> Turn | None:
    """None: the layer selects, for itself alone."""
    group = group_of(module, options["reuse"])
    return None if group is None else Turn(module, group, mask, tuple(query.shape), tuple(key.shape))


def group_of(module: torch.nn.Module, groups: Groups | None) -> list[int] | None:
    """The layers that share a selection with this one; None where there are no others."""
    if groups is None:
        return None
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError(
            "config.sparse_attn_reuse must be lists of numbers of layers, as configure(model, reuse=…) writes them, "
            f"got {groups!r}"
        )
    number = getattr(module, "layer_idx", None)
    return next((group for group in groups if len(group) > 1 and number in group), None)


def follows(module: torch.nn.Module, groups: Groups | None) -> bool:
    """Whether it attends to what another layer chose."""
    group = group_of(module, groups)
    return group is not None and module.layer_idx != group[0]


def check_reuse(reuse: int | Iterable[int]) -> int | list[int]:
    """A number of layers, or the numbers of those that select.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(reuse, Iterable) and not isinstance(reuse, (str, Tensor)):
        return [checks.integer("reuse", number, 0) for number in reuse]
    return checks.integer("reuse", reuse, 1)


def groups_among(
    reuse: int | list[int], found: dict[int, torch.nn.Module], layers: list[int] | None
) -> Groups:
    """The groups that `reuse` makes of the sparse layers, None is all; `found` has the attention module of each.

    Raises:
        ValueError: layers of one group that cannot have one selection.
    """
    sparse = sorted(found if layers is None else set(layers))
    if isinstance(reuse, int):
        groups = [sparse[first : first + reuse] for first in range(0, len(sparse), reuse)]
    else:
        firsts = sorted(set(reuse))
        for number in firsts:
            if number not in sparse:
                raise ValueError(f"reuse must hold numbers of sparse layers ({_list(sparse)}), got {number}")
        if sparse[:1] != firsts[:1]:
            raise ValueError(
                f"reuse must begin with the first sparse layer, {sparse[0]}, got {_list(firsts)}"
            )
        ends = [*firsts[1:], sparse[-1] + 1]
        groups = [[n for n in sparse if first <= n < end] for first, end in zip(firsts, ends, strict=True)]
    for group in groups:
        windows = {n: getattr(found[n], "sliding_window", None) for n in group}
        for number, window in windows.items():
            if window != windows[group[0]]:
                raise ValueError(
                    f"layers {group[0]} and {number} cannot have one selection, the sliding window of one is "
                    f"{windows[group[0]]} and of the other {window}: choose layers of one kind with layers=…"
                )
    return groups


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


# What is kept is a thread's own, and a config is known by its address for as long as it lives: configs have no hash.
class _Kept(threading.local):
    def __init__(self) -> None:
        self.of: dict[tuple[int, int], tuple[weakref.ref, Chosen]] = {}


_kept = _Kept()


def _put(config: Any, first: int, chosen: Chosen) -> None:
    name = f"{_ATTRIBUTE}_{first}"
    if torch.compiler.is_compiling():
        setattr(config, name, chosen)
        return
    config.__dict__.pop(name, None)  # of a graph whose call failed
    key = id(config), first
    _kept.of[key] = weakref.ref(config, lambda _, of=_kept.of: of.pop(key, None)), chosen


def _take(config: Any, first: int, last: bool) -> Chosen | None:
    """With `last` it is gone afterwards."""
    name = f"{_ATTRIBUTE}_{first}"
    found = getattr(config, name, None)
    if found is not None or torch.compiler.is_compiling():  # also of a graph that ended before this layer
        if last and found is not None:
            delattr(config, name)
        return found
    key = id(config), first
    reference, chosen = _kept.of.get(key, (None, None))
    if last:
        _kept.of.pop(key, None)
    return chosen if reference is not None and reference() is config else None
