"""What a selector returns, and what a selector is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sparse_attn import checks
from sparse_attn.rule import Rule


@dataclass(frozen=True, eq=False)
class Selection:
    """The keys that each query attends to, or the blocks of keys that each tile of queries attends to.

    Args:
        indices: int32 [B, G, Tq, K] of tokens (or [B, Tq, K] for G = 1), as :func:`sparse_attn.topk_select` gives
            them; with a block_size [B, G, ⌈Tq / query_tile⌉, M] of blocks, as :func:`sparse_attn.block_select` does.
        block_size: keys per block; None where `indices` are tokens.
        query_tile: queries that share a row of blocks.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
    """

    indices: Tensor
    block_size: int | None = None
    query_tile: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Tensor):
            raise TypeError(
                f"indices must be an int32 tensor of shape [B, G, Tq, K], got {checks.describe(self.indices)}"
            )
        checks.integer("query_tile", self.query_tile, 1)
        if self.block_size is not None:
            checks.integer("block_size", self.block_size, 1)
        elif self.query_tile != 1:
            raise ValueError(f"query_tile needs a block_size, got query_tile={self.query_tile} without it")


@runtime_checkable
class Selector(Protocol):
    """Anything that chooses keys.

    `top_k` is the whole budget of keys per query. What of the rule a selector cannot keep it refuses (ValueError).
    """

    def select(
        self,
        query: Tensor,  # [B, Hq, Tq, D]
        key: Tensor,  # [B, Hkv, Tk, D]
        top_k: int,
        rule: Rule,
    ) -> Selection: ...


def check_selector(selector: Any) -> Selector:
    if not callable(getattr(selector, "select", None)):
        raise TypeError(
            "selector must have a method select(query, key, top_k, rule) -> Selection, such as "
            f"sparse_attn.selection.Exact() has, got {checks.describe(selector)}"
        )
    return selector


def check_rule(rule: object) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a sparse_attn.selection.Rule, got {checks.describe(rule)}")
    return rule
