"""The inverse of `indices`: for each key the entries (query, slot) that name it, in the order of the queries.

A counting sort, the same for every launch. The queries are in tiles, each with a counter for each key: one pass counts,
sums over the tiles and then over the keys turn counts into the place of each tile's first entry, and a second pass
writes the entries. A program takes its queries one after the other. Within a query only a key that it names twice is
counted up twice, and both entries say the same of that query: which of them comes first changes nothing.

Bytes: the indices read twice, 4 an entry written; a sort on the device reads and writes 12 an entry several times.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import grid_of, outer_program

COUNTERS = 1 << 23  # there at once, twice: 64 MiB; more keys than that are counted range by range
PROGRAMS = 512  # fill a large device
LEAST = 64  # programs, where many keys leave room for few counters of each
SMALLEST = 16  # queries of a tile


VARYING = [
    *("indices_b", "indices_g", "indices_t", "sets", "groups"),
    *("first_query", "queries", "size", "budget", "first_key", "keys"),
]


@triton.jit(do_not_specialize=VARYING)
def walk_entries(
    indices,  # int32 [B, G, Tq, K]
    counts,  # int32 [B · G, tiles, keys]: of each tile and key of the range; with `order` the place of its next entry
    order,  # int32 [B · G, queries · K], or None: entries are counted alone
    indices_b, indices_g, indices_t, indices_k,
    sets,  # B · G
    groups,
    first_query,
    queries,
    size,  # of a tile
    budget,
    first_key,
    keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    number = outer_program()
    if number >= sets:
        return
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    far = number.to(tl.int64)
    indices += (number // groups).to(tl.int64) * indices_b + (number % groups).to(tl.int64) * indices_g
    indices += (first_query + tile * size).to(tl.int64) * indices_t
    counts += (far * tiles + tile) * keys
    if order is not None:
        order += far * queries * budget
    slots = tl.arange(0, BLOCK)
    for t in range(tile * size, tl.minimum((tile + 1) * size, queries)):
        for start in range(0, budget, BLOCK):
            slot = start + slots
            key = tl.load(indices + slot.to(tl.int64) * indices_k, mask=slot < budget, other=-1)
            valid = (key >= first_key) & (key < first_key + keys)
            place = tl.atomic_add(counts + (key - first_key), 1, mask=valid, sem="relaxed")
            if order is not None:
                tl.store(order + place, t * budget + slot, mask=valid)
        if order is not None:
            tl.debug_barrier()  # all of this query's entries have their places before the next one's
        indices += indices_t


def key_lists(
    indices: Tensor,  # int32 [B, G, Tq, K]
    key_length: int,
    first: int = 0,  # of the queries that are listed
    queries: int | None = None,  # how many; None: all
) -> tuple[Tensor, Tensor]:
    """(order int32 [B·G, queries·K], offsets int32 [B·G, Tk + 1]): entries order[offsets[j] : offsets[j + 1]] name key
    j; an entry is (query − first) · K + slot. What lies past the last offset is not written.
    """
    batch, groups, length, budget = indices.shape
    queries, sets = length if queries is None else queries, batch * groups
    order = indices.new_empty((sets, queries * budget))
    offsets = indices.new_zeros((sets, key_length + 1))
    there = max(COUNTERS // (sets * key_length), triton.cdiv(LEAST, sets))
    tiles = max(1, min(triton.cdiv(PROGRAMS, sets), there, triton.cdiv(queries, SMALLEST)))
    span = max(1, min(key_length, COUNTERS // (sets * tiles)))
    block = min(1024, max(32, triton.next_power_of_2(budget)))
    for low in range(0, key_length, span):
        high = min(low + span, key_length)
        counts = indices.new_zeros((sets, tiles, high - low))

        def walk(counts: Tensor, order: Tensor | None, low: int = low) -> None:
            walk_entries[grid_of(tiles, sets)](
                indices, counts, order, *indices.stride(), sets, groups, first, queries, triton.cdiv(queries, tiles),
                budget, low, counts.shape[2], BLOCK=block, num_warps=min(4, block // 32),
            )  # fmt: skip

        walk(counts, None)
        sums = counts.cumsum(1, dtype=counts.dtype)
        offsets[:, low + 1 : high + 1] = sums[:, -1].cumsum(1, dtype=counts.dtype) + offsets[:, low : low + 1]
        walk(sums.sub_(counts).add_(offsets[:, None, low:high]), order)
    return order, offsets
