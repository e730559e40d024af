"""Definition of `paged_select`: the selection of `topk_select` among keys that lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.topk_select import topk_select
from sparse_attn.wings.reference.wing import implements


@implements
def paged_select(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [P, Hkv, page size, D]
    block_table: Tensor,  # int32 [S, pages]: key j of the rule lies in page block_table[j // page size]
    top_k: int,
    rule: PackedRule,  # of packed sequences, as if all pages of the table lay end to end
) -> Tensor:  # int32 [1, G, T, K]
    pages, kv_heads, size, dim = key.shape
    table = block_table.flatten()
    there = (table >= 0) & (table < pages)
    if pages == 0:
        key = key.new_zeros((1, kv_heads, size, dim))
    rows = key[torch.where(there, table, 0).to(torch.int64)]  # [S · pages, Hkv, page size, D]
    rows = rows.transpose(0, 1).flatten(1, 2)[None]
    exists = there.repeat_interleave(size).expand(1, rule.groups, query.shape[2], -1)
    return topk_select(query, rows, top_k, rule._replace(attn_mask=exists), False, None, 1, 1)
