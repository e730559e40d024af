"""`block_select`: for each tile of queries the blocks that look best from afar."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.shards import shardable
from sparse_attn.ops.topk_select import ascending, select
from sparse_attn.rule import Rule

POOLS = ("mean", "bound")


@shardable("query:BHTD key:BHSD key_lengths:B key_starts:B* sink_logits:H", "BGNM")
def block_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_blocks: int,
    *,
    block_size: int = 64,
    query_tile: int = 64,
    pool: str = "mean",
    is_causal: bool = False,
    causal_offset: int | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    share: str = "none",
    key_starts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:
    r"""Selects for each tile of queries the `top_blocks` best blocks of keys by pooled queries and keys.

    A tile's score for block m is that of its mean query and the block's mean key; with ``pool="bound"`` it is an
    upper bound of the mean query's score for every key of the block, from the smallest and largest components:

    .. math:: \mathrm{score}_m = s\, \bar q \cdot \bar k_m \qquad\text{or}\qquad
              s \sum_d \max(\bar q_d \min_{j \in m} k_{jd},\; \bar q_d \max_{j \in m} k_{jd})

    The first block is always kept and, with `is_causal`, so are the blocks in which the tile's own queries lie;
    they count toward `top_blocks`. Nothing is differentiated. With `key_starts` a tile sees from the smallest start of
    its queries on, and the block with that key is its first; means leave out what lies before all starts.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv.
        top_blocks: blocks per tile, the whole budget.
        block_size: keys per block.
        query_tile: queries that share a choice; 1 gives each query its own.
        pool: "mean" or "bound".
        is_causal, causal_offset, key_lengths, scale, share, key_starts, softcap, sink_logits, backend: as in
            :func:`topk_select`; heads that share rank blocks by the attention mass of the pooled scores. scale must
            not be negative.

    Returns:
        int32 [B, G, ⌈Tq / query_tile⌉, min(top_blocks, ⌈Tk / block_size⌉)], numbers of blocks: unique, ascending,
        empty slots −1 at the end. No block without a key that some query of the tile sees is chosen.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Sources: mean keys: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025); bounds: Tang et
    al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (2024).

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(1, 8, 1024, 64), torch.randn(1, 2, 1024, 64)
        >>> sparse_attn.block_select(q, k, 4, is_causal=True, share="kv").shape
        torch.Size([1, 2, 16, 4])
    """
    query, key = autocast(query, key)
    checks.query_key(query, key)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, got {checks.describe(pool)}")
    is_causal = checks.boolean("is_causal", is_causal)
    scale = checks.softmax_scale(scale, query.shape[3])
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    offset = checks.causal_offset_of(is_causal, causal_offset, query_length, key_length)
    key_lengths = checks.lengths_of(key_lengths, key)
    starts = None if key_starts is None else checks.starts_of(key_starts, query)
    groups = checks.groups_of(share, query.shape[1], key.shape[1])
    count, tiles = -(-key_length // block_size), -(-query_length // query_tile)
    own = own_blocks(query_tile, block_size, offset) if is_causal else 0
    top_blocks = checks.integer("top_blocks", top_blocks, 1 + own)
    budget = min(top_blocks, count)
    if count == 0 or tiles == 0 or batch == 0:
        return query.new_full((batch, groups, tiles, budget), -1, dtype=torch.int32)

    end: int | Tensor = key_length
    if key_lengths is not None:
        end = key_lengths.clamp(0, key_length).to(torch.int64).view(-1, 1, 1, 1)
    exists: tuple[int | Tensor, int | Tensor] | None = None if key_lengths is None else (0, end)
    blocks = torch.arange(count, device=query.device)
    visible = (blocks * block_size < end).expand(1 if exists is None else batch, 1, tiles, count)
    first_block = None
    if starts is not None:
        starts = starts.to(torch.int64).clamp(0, key_length)
        exists = (starts.amin(1).view(-1, 1, 1, 1), end)
        tile = min(query_tile, query_length)  # a longer one would be filled up
        starts = pad(starts, (0, -query_length % tile), value=key_length)
        starts = starts.unflatten(1, (-1, tile)).amin(2)  # [B, N]
        first_block = starts // block_size
        starts = starts.view(batch, 1, tiles, 1)
        # A block is seen from the start on, and none where no key follows.
        visible = visible & (blocks >= first_block.view(batch, 1, tiles, 1)) & (starts < end)
    queries = _mean(query, query_tile, None)
    if pool == "mean":
        keys = _mean(key, block_size, exists)
    else:
        keys = _extremes(key, block_size, exists)
        queries = torch.cat((queries.clamp(min=0), queries.clamp(max=0)), dim=-1)
    rule = Rule(
        attn_mask=visible, sinks=1, share=share, scale=scale, softcap=softcap, sink_logits=sink_logits,
        key_starts=first_block,
    )  # fmt: skip
    if not is_causal:
        return select(queries, keys, budget, rule, backend=backend)

    first = torch.arange(tiles, device=query.device).unsqueeze(-1) * query_tile + offset  # [N, 1]
    last = (first + query_tile - 1).clamp(max=query_length - 1 + offset)
    visible = visible & (blocks * block_size <= last)
    if starts is not None:
        visible = visible & (starts <= last)
    near = visible & (blocks >= first.div(block_size, rounding_mode="floor"))
    far = select(queries, keys, top_blocks - own, replace(rule, attn_mask=visible & ~near), backend=backend)
    # The blocks of a tile's own queries are neighbours: at most `own` from that of its first query on.
    steps = first.div(block_size, rounding_mode="floor").clamp(min=0)
    steps = steps + torch.arange(min(own, count), device=query.device)  # [N, own]
    inside = steps < count
    steps = steps.clamp(max=count - 1).expand(batch, 1, tiles, -1)
    steps = torch.where(inside & near.expand(batch, -1, -1, -1).gather(-1, steps), steps, -1)
    steps = steps.expand(-1, groups, -1, -1)
    return ascending(torch.cat((far, steps.to(torch.int32)), dim=-1))[..., :budget]


def own_blocks(tile: int, block: int, offset: int) -> int:
    """The most blocks in which the queries of one tile can lie."""
    if block % tile == 0 and offset % tile == 0:
        return 1
    if tile % block == 0 and offset % block == 0:
        return tile // block
    return (tile - 2) // block + 2


def _split(rows: Tensor, size: int, exists: tuple | None) -> tuple[Tensor, Tensor]:
    """rows [B, H, T, D] → ([B, H, pieces, size, D] in float32 or float64, which rows of them exist)."""
    length = rows.shape[2]
    size = min(size, max(1, length))  # a longer piece would be filled up
    rows = pad(rows.to(torch.promote_types(rows.dtype, torch.float32)), (0, 0, 0, -length % size))
    position = torch.arange(rows.shape[2], device=rows.device).view(1, 1, -1, 1)
    first, end = exists or (0, length)
    there = (position >= first) & (position < end)
    return rows.unflatten(2, (-1, size)), there.unflatten(2, (-1, size))


def piece_means(rows: Tensor, size: int) -> Tensor:
    """rows [B, H, T, D] → [B, H, ⌈T / size⌉, D] in the same dtype: means of neighbours, the last of what is left."""
    return _mean(rows, size, None).to(rows.dtype)


def _mean(rows: Tensor, size: int, exists: tuple | None) -> Tensor:
    """[B, H, pieces, D]: the mean of what exists."""
    if exists is None and rows.shape[2] % size == 0:
        rows = rows.contiguous().unflatten(2, (-1, size))
        return rows.mean(3, dtype=torch.promote_types(rows.dtype, torch.float32))
    return _mean_of(*_split(rows, size, exists))


def _mean_of(rows: Tensor, there: Tensor) -> Tensor:
    # Contiguous, for the order of a sum depends on strides: a pack's pieces have the means of a sequence alone.
    return torch.where(there, rows, 0.0).contiguous().sum(3) / there.sum(3).clamp(min=1)


def _extremes(rows: Tensor, size: int, exists: tuple | None) -> Tensor:
    """[B, H, pieces, 2·D]: the largest components, then the smallest; 0 where nothing exists."""
    return _extremes_of(*_split(rows, size, exists))


def _extremes_of(rows: Tensor, there: Tensor) -> Tensor:
    high = torch.where(there, rows, -torch.inf).amax(3)
    low = torch.where(there, rows, torch.inf).amin(3)
    return torch.where(there.any(3), torch.cat((high, low), dim=-1), 0.0)


def pooled(rows: Tensor, there: Tensor, size: int, pool: str) -> Tensor:
    """rows [1, H, pieces · size, D] → [1, H, pieces, D], or 2·D of a bound; `there` bool [pieces · size]."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(2, (-1, size))
    there = there.view(1, 1, -1, size, 1)
    return _mean_of(rows, there) if pool == "mean" else _extremes_of(rows, there)


def first_and_last(rule: Rule, last: int) -> Rule:
    """The rule, with the first block that is seen always kept, and the last `last`."""
    return replace(rule, sinks=1, window=last)


def keeping_the_first(**parts: Any) -> Rule:
    """A rule of blocks: the first that is seen is always kept."""
    return Rule(sinks=1, **parts)
