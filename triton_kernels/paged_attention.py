"""`paged_attention`: `topk_attention` over keys and values in the pages of a cache.

The selection is `paged_select`'s; the rows that it chose are found through the table once, and gathered where they lie.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .gathered_attention import gathered_attention
from .lib.pages import physical, rows_of
from .paged_select import pages_of
from .topk_attention import LARGEST_BUDGET, weigh_values
from .topk_select import select


def paged_attention(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [P, Hkv, page size, D]
    value: Tensor,  # [P, Hkv, page size, Dv]
    block_table: Tensor,  # int32 [S, pages]
    top_k: int,
    rule: PackedRule,
    *index: Tensor | None,  # of a PagedKeyIndex, which changes no result
) -> tuple[Tensor, Tensor, Tensor]:  # out [T, Hq, Dv], lse [T, Hq], int32 [1, G, T, K]
    pages = pages_of(key, block_table)
    fused = rule.groups == query.shape[1] and min(top_k, pages.keys) <= LARGEST_BUDGET
    indices, scores = select(query, key, top_k, rule, fused, pages=pages)
    step, (*keys, values) = rows_of(value) if fused else rows_of(key, value)
    rows = physical(indices, pages, step)
    if fused:
        out, lse = weigh_values(values, rows, scores, rule, query.dtype)
    else:
        scoring = rule.scale, rule.softcap, rule.sink_logits
        out, lse = gathered_attention(query, *keys, values, rows, *scoring)
    return *(t[0].transpose(0, 1).contiguous() for t in (out, lse)), indices
