"""Blocks of blocks, then blocks, then tokens: a choice whose work grows more slowly than T²."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops import topk_select
from sparse_attn.ops.block_select import block_select, first_and_last, piece_means
from sparse_attn.ops.shards import refuse_context
from sparse_attn.rule import Rule
from sparse_attn.selection.selection import Selection, check_rule


@dataclass(frozen=True)
class Hierarchical:
    r"""The best keys by true q·k among blocks that were found among blocks of blocks, all by mean queries and keys.

    A tile is `block_size` queries. With :math:`\bar q_n` its mean query and :math:`\bar k` the mean key of a block (of
    block_size keys) or of a group (of `group` blocks), three choices follow each other, each among what the one before
    left:

    1. groups by :math:`\bar q_n \cdot \bar k`: `factor` times as many keys as the next choice leaves;
    2. blocks by :math:`\bar q_n \cdot \bar k`: `factor` · top_k keys;
    3. for each query the top_k keys by :math:`q \cdot k`.

    The first group and block and the tile's own are always in. Tiles meet groups in T² / (block_size² · group) scores,
    which is 65,536 times fewer than pairs for the defaults; all else grows with T · top_k · factor.

    Args:
        block_size: keys of a block, and queries of a tile.
        group: blocks of a group.
        factor: how many times more keys each level leaves than the one below may take.

    `select` takes of a rule causality, scale, share, soft cap and the logits beside the softmax; it refuses masks,
    lengths, starts and other keys that are always kept (ValueError).

    Example:
        >>> import torch
        >>> from sparse_attn.selection import Hierarchical, Rule, attend
        >>> q, k, v = (torch.randn(1, 2, 4096, 16) for _ in range(3))
        >>> rule = Rule(is_causal=True)
        >>> attend(q, k, v, Hierarchical().select(q, k, 128, rule), rule=rule).shape
        torch.Size([1, 2, 4096, 16])
    """

    block_size: int = 64
    group: int = 16
    factor: int = 4
    backend: str | None = None

    def __post_init__(self) -> None:
        checks.integer("block_size", self.block_size, 1)
        checks.integer("group", self.group, 2)
        checks.integer("factor", self.factor, 1)

    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        refuse_context("Hierarchical")
        known = "is_causal", "causal_offset", "scale", "share", "softcap", "sink_logits"
        check_rule(rule).only("blocks of blocks", *known)
        checks.query_key(query, key)
        packed = rule.packed(query, key, top_k)
        among = self.blocks(query, key, top_k, rule, packed.causal_offset if packed.is_causal else 0)
        return Selection(
            topk_select.select(
                query, key, top_k, rule, among=among, backend=self.backend, function="Hierarchical"
            )
        )

    def blocks(self, query: Tensor, key: Tensor, top_k: int, rule: Rule, offset: int) -> topk_select.Among:
        """The blocks that tokens are then chosen from; `offset` is that of the rule's diagonal."""
        tile = max(1, min(self.block_size, query.shape[2]))
        count = -(-key.shape[2] // self.block_size)
        queries, keys = piece_means(query, tile), piece_means(key, self.block_size)
        # Tile n sees the blocks up to that of its last query; its own queries lie in the last or the last two.
        last = (tile - 1 + offset) // self.block_size
        own = last - offset // self.block_size + 1
        wanted = min(self.factor * -(-top_k // self.block_size) + own + 1, count)
        groups = max(self.factor * -(-wanted // self.group) + 2, 3)
        causal = rule.is_causal
        afar = replace(rule, causal_offset=last if causal else None)
        chosen = block_select(
            queries, keys, groups, block_size=self.group, query_tile=1, is_causal=causal,
            causal_offset=last if causal else None, scale=rule.scale, share=rule.share, softcap=rule.softcap,
            sink_logits=rule.sink_logits, backend=self.backend,
        )  # fmt: skip
        blocks = topk_select.select(
            queries,
            keys,
            max(wanted, own + 1),
            first_and_last(afar, own if causal else 0),
            among=topk_select.Among(chosen, self.group, 1),
            backend=self.backend,
            function="Hierarchical",
        )
        return topk_select.Among(blocks, self.block_size, tile)
