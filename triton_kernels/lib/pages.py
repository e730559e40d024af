"""Keys in the pages of a cache, and tiles of queries that are of one sequence each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Pages(NamedTuple):
    """Where keys lie whose number in a row is known: key j in page table[j // size]."""

    table: Tensor  # int32 [S · pages], contiguous
    size: int  # keys of a page
    count: int  # pages that there are
    room: int  # keys of a sequence at most

    @property
    def keys(self) -> int:
        """Of all rows of the table, end to end."""
        return self.table.shape[0] * self.size


@triton.jit
def key_places(
    first,  # of the keys, a multiple of how many they are
    index,  # int32 [BN]
    exists,  # bool [BN]
    table,  # int32 [S · pages] or None
    pages,  # how many there are
    key_b,  # from one page to the next, where there are pages
    key_t,
    PAGE: tl.constexpr,  # keys of a page
    BLOCK_N: tl.constexpr,
):
    """(int64 [BN] where keys lie from the first of their head on, bool [BN] which of them exist)."""
    if table is None:
        place = index.to(tl.int64) * key_t
    else:
        if PAGE % BLOCK_N == 0:  # all in one
            page = tl.load(table + first // PAGE) + tl.zeros_like(index)
        else:
            page = tl.load(table + index // PAGE, mask=exists, other=-1)
        exists = exists & (page >= 0) & (page < pages)
        place = page.to(tl.int64) * key_b + (index % PAGE).to(tl.int64) * key_t
    return place, exists


@triton.jit
def follows(query, starts, batch, starts_b, starts_t, QUERIES: tl.constexpr):
    """Whether a query is in the tile of the one before it: both of one sequence, and not where a tile begins."""
    rows = starts + batch * starts_b + query.to(tl.int64) * starts_t
    inside = query % QUERIES != 0
    return inside & (tl.load(rows) == tl.load(rows - starts_t, mask=inside, other=0))


@triton.jit
def last_of_tile(
    first,  # int32: a query that does not follow
    starts,  # int [B, Tq]: equal for queries of one sequence
    batch,
    starts_b,
    starts_t,
    query_length,
    QUERIES: tl.constexpr,
    SPAN: tl.constexpr,  # a power of two, QUERIES or more
):
    """The last query of the tile that this one begins: the next one is of another sequence, or begins a tile."""
    step = tl.arange(0, SPAN)
    rows = starts + batch * starts_b + first.to(tl.int64) * starts_t
    there = (step < QUERIES - first % QUERIES) & (first + step < query_length)
    same = there & (tl.load(rows + step.to(tl.int64) * starts_t, mask=there, other=0) == tl.load(rows))
    return first + tl.min(tl.where(same, SPAN, step), 0) - 1


@triton.jit(do_not_specialize=["count", "pages", "step"])
def _physical(
    rows,  # int32 [N], written
    indices,  # int32 [N]
    table,  # int32 [S · pages]
    count,  # N
    pages,
    step,  # rows from one page to the next
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < count, other=-1)
    page = tl.load(table + tl.maximum(index, 0) // PAGE, mask=index >= 0, other=-1)
    there = (page >= 0) & (page < pages)
    tl.store(rows + at, tl.where(there, page * step + index % PAGE, -1), mask=at < count)


def physical(indices: Tensor, pages: Pages, step: int) -> Tensor:
    """Numbers of keys as rows of pages that lie `step` rows apart; −1 where there is none."""
    rows = torch.empty_like(indices)
    if indices.numel():
        _physical[(triton.cdiv(indices.numel(), 1024),)](
            rows, indices, pages.table, indices.numel(), pages.count, step, PAGE=pages.size, BLOCK=1024,
        )  # fmt: skip
    return rows


def rows_of(*caches: Tensor) -> tuple[int, list[Tensor]]:
    """Pages [P, H, page size, D] as rows in a row, [1, H, R, D], and how many of them lie from one page to the next.

    Views, where the pages of all of them lie so that they can be.
    """
    steps = {_step_of(pages) for pages in caches}
    if len(steps) > 1 or None in steps:
        return caches[0].shape[2], [pages.transpose(0, 1).flatten(1, 2)[None] for pages in caches]
    step = steps.pop()
    found = []
    for pages in caches:
        count, heads, size, dim = pages.shape
        of_page, of_head, of_row, of_dim = pages.stride()
        rows = max(0, (count - 1) * step + size)
        of_row = of_page if size == 1 else of_row
        found.append(pages.as_strided((1, heads, rows, dim), (0, of_head, of_row, of_dim)))
    return step, found


def _step_of(pages: Tensor) -> int | None:
    count, _, size, _ = pages.shape
    of_page, _, of_row, _ = pages.stride()
    if count <= 1 or size == 1:
        return size
    if of_row > 0 and of_page % of_row == 0 and of_page // of_row >= size:
        return of_page // of_row
    return None
