"""`paged_attention` and `paged_select`: topk_attention and its selection for packed sequences in the pages of a cache.

A sequence of a pack has the keys of its row of the table, page after page; the rule and the selection speak of them as
if all pages of the table lay end to end. Nothing is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import rule as rules
from sparse_attn.checks import packed as check
from sparse_attn.ops import paged_index
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.declare import Op
from sparse_attn.ops.paged_index import PagedKeyIndex
from sparse_attn.rule import PackedRule, Rule


def fake(query, key, block_table, top_k, rule: PackedRule, *index) -> Tensor:
    slots = torch.sym_min(top_k, block_table.shape[0] * block_table.shape[1] * key.shape[2])
    return query.new_empty((1, rule.groups, query.shape[2], slots), dtype=torch.int32)


def fake_attention(
    query, key, value, block_table, top_k, rule: PackedRule, *index
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[2], query.shape[1]
    out = query.new_empty((*rows, value.shape[3]))
    return out, query.new_empty(rows, dtype=torch.float32), fake(query, key, block_table, top_k, rule)


INDEX = "Tensor? codes, Tensor? bounds, Tensor? shift"  # of a PagedKeyIndex
SELECT = Op(
    "paged_select",
    f"(Tensor query, Tensor key, Tensor block_table, SymInt top_k, {rules.SCHEMA}, {INDEX}) -> Tensor",
    fake,
)
OP = Op(
    "paged_attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor block_table, SymInt top_k, {rules.SCHEMA}, {INDEX}) -> "
    "(Tensor out, Tensor lse, Tensor indices)",
    fake_attention,
)


def select(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [P, page size, Hkv, D]
    block_table: Tensor,  # int32 [S, pages]
    top_k: int,
    rule: Rule,
    *,
    key_index: PagedKeyIndex | None = None,
    backend: str | None = None,
    function: str = "paged_select",
) -> Tensor:  # int32 [1, G, T, K]
    q, k = _checked(query, key)
    packed = rule.packed(q, k, top_k)
    index = paged_index.parts_of(key_index, k.transpose(1, 2))
    wing = SELECT.choose(q, backend, rule=rule, function=function, sizes=_sizes(key_index, q))
    return SELECT.on(wing)(q, k, block_table, top_k, *packed.parts(), *index)


def attend_best(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [P, page size, Hkv, D]
    value: Tensor,  # [P, page size, Hkv, Dv]
    block_table: Tensor,  # int32 [S, pages]
    top_k: int,
    rule: Rule,
    *,
    key_index: PagedKeyIndex | None = None,
    backend: str | None = None,
    function: str = "paged_attention",
) -> tuple[Tensor, Tensor, Tensor]:  # out [T, Hq, Dv], lse [T, Hq], indices int32 [1, G, T, K]
    q, k, v = _checked(query, key, value)
    packed = rule.packed(q, k, top_k)
    index = paged_index.parts_of(key_index, k.transpose(1, 2))
    wing = OP.choose(q, backend, rule=rule, function=function, sizes=_sizes(key_index, q, v))
    return OP.on(wing)(q, k, v, block_table, top_k, *packed.parts(), *index)


def _sizes(key_index: PagedKeyIndex | None, query: Tensor, value: Tensor | None = None) -> dict[str, int]:
    return sizes_of(query, value) | ({} if key_index is None else {"key_index": 1})


def _checked(query: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
    """As the ops take them: query [1, Hq, T, D], pages [P, Hkv, page size, D]."""
    query, *pages = autocast(query, *caches)
    found = query.transpose(0, 1)[None], *(t.transpose(1, 2) for t in pages)
    check.paged_tensors(*found)
    return found


def rows(*caches: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Pages [P, page size, H, D] as rows in a row, [1, H, R, D]: (rows from one page to the next, of each cache those).

    Views, wherever the pages of all of them lie so that they can be.
    """
    steps = {_rows_of_page(pages) for pages in caches}
    step = steps.pop()
    if steps or step == caches[0].shape[1]:
        # Side by side; what is not becomes so by a copy.
        return caches[0].shape[1], tuple(pages.flatten(0, 1).transpose(0, 1)[None] for pages in caches)
    flat = []
    for pages in caches:
        count, size, heads, dim = pages.shape
        _, of_row, of_head, of_dim = pages.stride()
        # Among the rows of one cache lie those of another, which no index names.
        all_rows = pages.as_strided(((count - 1) * step + size, heads, dim), (of_row, of_head, of_dim))
        flat.append(all_rows.transpose(0, 1)[None])
    return step, tuple(flat)


def _rows_of_page(pages: Tensor) -> int:
    count, size = pages.shape[:2]
    of_page, of_row = pages.stride()[:2]
    if count > 1 and size > 1 and of_row > 0 and of_page % of_row == 0 and of_page // of_row >= size:
        return of_page // of_row
    return size


def physical(
    indices: Tensor,  # int32 [1, G, T, K], as the ops have them
    block_table: Tensor,  # int32 [S, pages]
    page_size: int,
    page_count: int,
    step: int,  # rows from one page to the next
) -> Tensor:  # int32 [1, G, T, K]: rows; −1 where there is none
    chosen = indices.clamp(min=0)
    page = block_table.flatten()[chosen // page_size if page_size > 1 else chosen]
    there = (indices >= 0) & (page >= 0) & (page < page_count)
    return torch.where(there, page * step + chosen % page_size, -1)


def placed(indices: Tensor, page_size: int, page_count: int, step: int) -> Tensor:
    """Physical indices page · page_size + place, of any integer type, as int32 rows of pages `step` rows apart."""
    there = (indices >= 0) & (indices < page_size * page_count)
    if step != page_size:
        indices = indices // page_size * step + indices % page_size
    return torch.where(there, indices, -1).to(torch.int32)
