"""Definition of `paged_attention`, `topk_attention` over keys and values in pages, and of its selection alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.gathered_attention import gathered_attention
from sparse_attn.wings.reference.topk_select import topk_select
from sparse_attn.wings.reference.wing import implements


@implements
def paged_select(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [P, Hkv, page size, D]
    block_table: Tensor,  # int32 [S, pages]: key j of the rule lies in page block_table[j // page size]
    top_k: int,
    rule: PackedRule,  # of packed sequences, as if all pages of the table lay end to end
    *index: Tensor | None,  # codes, bounds and shift of a PagedKeyIndex, which changes no result
) -> Tensor:  # int32 [1, G, T, K]
    rows, there = _end_to_end(key, block_table)
    exists = there.expand(1, rule.groups, query.shape[2], -1)
    return topk_select(query, rows, top_k, rule._replace(attn_mask=exists), False, None, 1, 1)


def _end_to_end(pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Pages [P, H, page size, D] in the order of the table: ([1, H, Tk, D], bool [Tk]: whether there is such a key)."""
    count, heads, size, dim = pages.shape
    table = block_table.flatten()
    there = (table >= 0) & (table < count)
    if count == 0:
        pages = pages.new_zeros((1, heads, size, dim))
    rows = pages[torch.where(there, table, 0).to(torch.int64)]  # [S · pages, H, page size, D]
    return rows.transpose(0, 1).flatten(1, 2)[None], there.repeat_interleave(size)


@implements
def paged_attention(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [P, Hkv, page size, D]
    value: Tensor,  # [P, Hkv, page size, Dv]
    block_table: Tensor,  # int32 [S, pages]
    top_k: int,
    rule: PackedRule,
    *index: Tensor | None,  # likewise
) -> tuple[Tensor, Tensor, Tensor]:  # out [T, Hq, Dv], lse [T, Hq], int32 [1, G, T, K]
    indices = paged_select(query, key, block_table, top_k, rule)
    scoring = rule.scale, rule.softcap, rule.sink_logits
    rows = _end_to_end(key, block_table)[0], _end_to_end(value, block_table)[0]
    out, lse = gathered_attention(query, *rows, indices, *scoring)
    return *(t[0].transpose(0, 1).contiguous() for t in (out, lse)), indices
