"""`indexer_select`: the keys of the largest indexer scores, in the selection of `topk_select` (lib/select_tiles.py).

What differs is what ranks a key: Σ over the indexer's heads of weight · max(0, q·k), made tile by tile from one load of
the keys; of rows rounded to 8 bits in products of bytes.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .topk_select import select


def indexer_select(
    query: Tensor,  # [B, G·Hi, Tq, D]
    key: Tensor,  # [B, G, Tk, D]
    weights: Tensor,  # float32 [B, G·Hi, Tq]
    top_k: int,
    rule: PackedRule,  # what it says of scores plays no part
    int8: bool,
) -> Tensor:  # int32 [B, G, Tq, K]
    return select(query, key, top_k, rule, rounded=int8, weights=weights)[0]
