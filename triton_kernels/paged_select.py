"""`paged_select`: the selection of `topk_select` (lib/select_tiles.py) over keys that lie in the pages of a cache.

A tile has queries of one sequence alone, with all query heads of a key head where those select for themselves, so that
a key is read once for all of them, from the page where it lies. The keys of a sequence are split over programs, by its
own length, which only the device knows; the best of all parts are the best of all, to the bit.

Floor: the keys. 16 sequences of 8,192 keys, 8 key heads, D = 128 in bfloat16 are 268 MB: 0.08 ms at 3.35 TB/s.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.pages import Pages
from .topk_select import select


def paged_select(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [P, Hkv, page size, D]
    block_table: Tensor,  # int32 [S, pages]: key j of the rule lies in page block_table[j // page size]
    top_k: int,
    rule: PackedRule,
    *index: Tensor | None,  # of a PagedKeyIndex, which changes no result
) -> Tensor:  # int32 [1, G, T, K]
    return select(query, key, top_k, rule, pages=pages_of(key, block_table))[0]


def pages_of(key: Tensor, block_table: Tensor) -> Pages:
    count, _, size, _ = key.shape
    return Pages(block_table.flatten().contiguous(), size, count, block_table.shape[1] * size)
