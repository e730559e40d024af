"""Tiles of queries beside tiles of keys: what the kernels of `block_attention` and of tails share.

The queries of all heads that share a key head and its blocks (a "unit") are one axis of rows, query by query, so that
grouped heads fill tiles whatever the number of queries. A row of keys is a key, or the mean of UNIT keys; a query sees
it where it sees all of them, so what a query sees are the rows of [low, high).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.rule import PackedRule

from .common import is_half, outer_program
from .visible_keys import first_keys, last_keys


@triton.jit
def rows_of_unit(row, end, first_query, unit, shared):
    """(present, query of the chunk, query, head) of rows of a unit, which end at `end`."""
    present = row < end
    local = tl.where(present, row // shared, 0)
    return present, local, first_query + local, (unit * shared + row % shared).to(tl.int64)


@triton.jit
def words_of_rows(
    words, b, local, head, heads, groups, chunk, key_rows, UNIT: tl.constexpr, MEAN: tl.constexpr
):
    """Pointers to the words of each row's query, in its head's selection."""
    list_of_row = b * groups + head * groups // heads
    if MEAN:
        width = (key_rows + 31) // 32
    else:
        width = key_rows * ((UNIT + 31) // 32)
    return words + (list_of_row * chunk + local) * width


@triton.jit
def row_limits(
    t,  # int32 [M]: query
    present,  # bool [M]
    b,  # int64: batch entry
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    starts_b,
    starts_t,
    offsets,  # int [B, Tq] or None: causal offsets, where each query has its own
    offsets_b,
    offsets_t,
    key_length,
    causal_offset,
    IS_CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(low, high) int32 [M]: the rows of keys that each query sees; none where it is not there."""
    end = key_length
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), key_length).to(tl.int32)
    high = tl.zeros_like(t) + end
    if IS_CAUSAL:
        high = last_keys(offsets, b, t, offsets_b, offsets_t, causal_offset, end)
    low = tl.zeros_like(t)
    if starts is not None:
        low = first_keys(starts, b, t, starts_b, starts_t, key_length)
    if UNIT > 1:
        low = (low + (UNIT - 1)) // UNIT
        high = high // UNIT
    return low, tl.where(present, high, 0)


@triton.jit
def _ones(x):
    """How many bits are set in int32."""
    x = x.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit
def seen_and_bias(
    words_of,  # pointer to the words of each query, or None
    place,  # int32: row of keys
    inside,  # bool: whether it is there
    low,
    high,
    UNIT: tl.constexpr,
):
    """(bool seen, float32 bias): which queries see which rows of keys, and log2 of how many keys a mean stands for.

    Operands have two dimensions and broadcast. The words of a row of keys have a bit for each of its keys that is
    chosen, which does not count a second time.
    """
    seen = inside & (place >= low) & (place < high)
    bias = 0.0
    if words_of is not None:
        WORDS: tl.constexpr = (UNIT + 31) // 32
        left = tl.zeros_like(seen.to(tl.int32)) + UNIT
        for word in tl.static_range(WORDS):
            left -= _ones(tl.load(words_of + (place * WORDS + word), mask=seen, other=0))
        seen &= left > 0
        bias = tl.log2(tl.maximum(left, 1).to(tl.float32))
    return seen, bias


@triton.jit
def seen_and_chosen(
    words_of,  # pointer to the words of each query, or None
    first,  # the first of the rows of keys, a multiple of how many they are
    place,  # int32: row of keys
    inside,  # bool: whether it is there
    low,
    high,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEAN: tl.constexpr,  # a word has a bit for each of 32 rows of keys, which is set where the query chose it
):
    """(bool seen, float32 bias, bool chosen); without MEAN what is seen is chosen."""
    if MEAN:
        seen, bias = seen_and_bias(None, place, inside, low, high, UNIT)
        if BLOCK_K <= 32:  # one word has them all
            word = tl.load(words_of + first // 32)
        else:
            word = tl.load(words_of + place // 32, mask=seen, other=0)
        chosen = seen & (((word >> (place % 32)) & 1) != 0)
    else:
        seen, bias = seen_and_bias(words_of, place, inside, low, high, UNIT)
        chosen = seen
    return seen, bias, chosen


@triton.jit(do_not_specialize=["programs", "first_query", "keys", "width"])
def mark_chosen(
    words,  # int32 [B, G, chunk, width], zeros
    indices,  # int32 [B, G, Tq, K]
    indices_b,
    indices_g,
    indices_t,
    indices_k,
    programs,  # B · G
    groups,
    first_query,  # of this chunk
    budget,
    keys,  # that are in means
    width,  # words of one query
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sets the bit of each chosen key. Bits are or-ed, so that neither order nor repetition changes anything."""
    outer = outer_program().to(tl.int64)
    if outer >= programs:
        return
    local = tl.program_id(0).to(tl.int64)
    row = (
        indices + outer // groups * indices_b + outer % groups * indices_g + (first_query + local) * indices_t
    )
    words += (outer * tl.num_programs(0) + local) * width
    for start in range(0, budget, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        index = tl.load(row + slot.to(tl.int64) * indices_k, mask=slot < budget, other=-1)
        valid = (index >= 0) & (index < keys)
        index = tl.where(valid, index, 0)
        within = index % UNIT
        word = index // UNIT * ((UNIT + 31) // 32) + within // 32
        bit = (tl.full((BLOCK_K,), 1, tl.int32)) << (within % 32)
        tl.atomic_or(words + word, bit, mask=valid, sem="relaxed")


@dataclass(frozen=True)
class Shape:
    """The numbers of a call, by the names that kernels give them."""

    batch: int
    heads: int
    kv_heads: int
    units: int  # max(G, Hkv): sets of heads that share keys and what was chosen
    groups: int
    query_length: int
    key_rows: int
    dim: int
    value_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, groups: int, units: int) -> Shape:
        batch, heads, query_length, dim = query.shape
        kv_heads, key_rows = key.shape[1:3]
        return cls(batch, heads, kv_heads, units, groups, query_length, key_rows, dim, value.shape[3])

    @property
    def shared(self) -> int:
        return self.heads // self.units

    def dims(self) -> dict[str, int]:
        return {
            "DIM": self.dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(self.dim)),
            "BLOCK_VALUE": max(16, triton.next_power_of_2(self.value_dim)),
        }


def visibility(rule: PackedRule, query_length: int, key_length: int) -> dict[str, object]:
    """The rule's part of a launch."""
    of_queries = {"starts": rule.key_starts, "causal_offsets": rule.causal_offsets}
    return {
        "lengths": rule.key_lengths,
        **of_queries,
        **{
            f"{name}_{axis}": 0 if t is None else t.stride(place)
            for name, t in of_queries.items()
            for place, axis in enumerate("bt")
        },
        "key_length": key_length,
        # Positions beyond every key are all alike; like this their sums stay within 32 bits.
        "causal_offset": min(max(rule.causal_offset, -query_length), key_length),
        "IS_CAUSAL": rule.is_causal,
    }


def strides(name: str, tensor: Tensor, axes: str = "bhtd") -> dict[str, int]:
    return {f"{name}_{axis}": n for axis, n in zip(axes, tensor.stride(), strict=True)}


def row_block(rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile: a tensor core takes 16 at least."""
    return min(64 if is_half(dtype) else 32, max(16, triton.next_power_of_2(rows)))
