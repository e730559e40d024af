"""The selectors of this package: how keys are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops import indexer_select, topk_attention, topk_select
from sparse_attn.ops.block_select import block_select
from sparse_attn.ops.key_index import KeyIndex
from sparse_attn.rule import Rule
from sparse_attn.selection.selection import Selection, check_rule


@dataclass(frozen=True)
class Exact:
    """The keys of the largest true q·k (:func:`sparse_attn.topk_select`).

    Args:
        key_index: the :class:`sparse_attn.KeyIndex` of the keys that it will be given: the same result for fewer bytes.
    """

    backend: str | None = None
    key_index: KeyIndex | None = None

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        indices = topk_select.select(
            query, key, top_k, check_rule(rule), key_index=self.key_index, backend=self.backend
        )
        return Selection(indices)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, top_k: int, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both stages in one op, the same result: (out, lse, indices)."""
        return topk_attention.attend_best(
            query, key, value, top_k, check_rule(rule), key_index=self.key_index, backend=self.backend
        )


@dataclass(frozen=True)
class Rounded:
    """The keys of the largest q·k of rows that are rounded to 8 bits (:func:`sparse_attn.quantized_select`)."""

    bits: int = 8
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ValueError(f"bits must be 8, got {checks.describe(self.bits)}")

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        indices = topk_select.select(
            query,
            key,
            top_k,
            check_rule(rule),
            rounded=True,
            backend=self.backend,
            function="quantized_select",
        )
        return Selection(indices)


class Scorer(Protocol):
    """What LowRank works with, such as :class:`sparse_attn.nn.LowRankScorer`."""

    def select(self, query: Tensor, key: Tensor | None, top_k: int, **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class LowRank:
    """The keys of the largest q·k in a few components, by a fitted :class:`sparse_attn.nn.LowRankScorer`."""

    scorer: Scorer
    backend: str | None = None

    def __post_init__(self) -> None:
        if not callable(getattr(self.scorer, "select", None)):
            raise TypeError(
                f"scorer must be a sparse_attn.nn.LowRankScorer, got {checks.describe(self.scorer)}"
            )

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        return Selection(
            self.scorer.select(query, key, top_k, **check_rule(rule).arguments(), backend=self.backend)
        )


@dataclass(frozen=True, eq=False)
class FromIndexer:
    """The keys of the largest indexer score (:func:`sparse_attn.indexer_select`), whatever the attention's own q·k.

    Args:
        query: [B, G·Hi, Tq, Di], key: [B, G, Tk, Di], weights: [B, G·Hi, Tq]: what a :class:`sparse_attn.nn.Indexer`
            made of the hidden states. Its groups say who shares a selection; the rule's `share`, and what it says of
            scores (scale, soft cap, sink logits), say nothing here. It may know fewer keys than there are: no query may
            see those that it does not know.
        int8: score from rounded queries and keys.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    int8: bool = False
    backend: str | None = None

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        indices = indexer_select.select(
            self.query, self.key, self.weights, top_k, check_rule(rule), int8=self.int8, backend=self.backend
        )
        return Selection(indices)


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of keys for tiles of queries (:func:`sparse_attn.block_select`): the first, the own, the best.

    `top_k` must be a multiple of block_size. A single query (decoding) is a tile of its own. The rule must be without
    attn_mask and without other keys that are always kept.
    """

    block_size: int = 64
    query_tile: int = 64
    pool: str = "mean"
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.integer("block_size", self.block_size, 1)
        checks.integer("query_tile", self.query_tile, 1)

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        return self.select_count(query, key, _blocks_in(top_k, self.block_size), rule)

    def select_count(self, query: Tensor, key: Tensor, count: int, rule: Rule) -> Selection:
        """`count` blocks."""
        known = (
            "is_causal",
            "causal_offset",
            "key_lengths",
            "key_starts",
            "scale",
            "share",
            "softcap",
            "sink_logits",
        )
        check_rule(rule).only("whole blocks", *known)
        assert not isinstance(rule.causal_offset, Tensor)  # a tensor is not among what is known
        tile = self.query_tile if query.shape[2] > 1 else 1
        blocks = block_select(
            query, key, count, block_size=self.block_size, query_tile=tile, pool=self.pool,
            is_causal=rule.is_causal, causal_offset=rule.causal_offset, key_lengths=rule.key_lengths,
            scale=rule.scale, share=rule.share, key_starts=rule.key_starts, softcap=rule.softcap,
            sink_logits=rule.sink_logits, backend=self.backend,
        )  # fmt: skip
        return Selection(blocks, self.block_size, tile)


@dataclass(frozen=True)
class Refined:
    """The best keys by true q·k of `factor` times as many blocks (:func:`sparse_attn.refine_blocks`)."""

    factor: int = 4
    blocks: Blocks = Blocks()
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.integer("factor", self.factor, 1)
        if not isinstance(self.blocks, Blocks):
            raise TypeError(f"blocks must be a Blocks selector, got {checks.describe(self.blocks)}")

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        count = self.factor * _blocks_in(top_k, self.blocks.block_size)
        chosen = self.blocks.select_count(query, key, count, rule)
        among = topk_select.Among(chosen.indices, self.blocks.block_size, chosen.query_tile)
        indices = topk_select.select(
            query, key, top_k, rule, among=among, backend=self.backend, function="refine_blocks"
        )
        return Selection(indices)


def _blocks_in(top_k: int, block_size: int) -> int:
    top_k = checks.top_k_of(top_k)
    if top_k % block_size:
        raise ValueError(f"top_k must be a multiple of block_size={block_size} for whole blocks, got {top_k}")
    return top_k // block_size
