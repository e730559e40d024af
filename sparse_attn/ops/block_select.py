"""`block_select`: for each tile of queries the blocks that look best from afar; `refine_blocks`: their tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.topk_select import topk_select
from sparse_attn.reference.chunks import query_chunks
from sparse_attn.reference.topk_select import _mass, best_of

POOLS = ("mean", "bound")


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
    backend: str | None = None,
) -> Tensor:
    r"""Selects for each tile of queries the `top_blocks` best blocks of keys by pooled queries and keys.

    A tile's score for block m is that of its mean query and the block's mean key; with ``pool="bound"`` it is an
    upper bound of the mean query's score for every key of the block, from the smallest and largest components:

    .. math:: \mathrm{score}_m = s\, \bar q \cdot \bar k_m \qquad\text{or}\qquad
              s \sum_d \max(\bar q_d \min_{j \in m} k_{jd},\; \bar q_d \max_{j \in m} k_{jd})

    The first block is always kept and, with `is_causal`, so are the blocks in which the tile's own queries lie;
    they count toward `top_blocks`. Nothing is differentiated.

    Args:
        query: [B, Hq, Tq, D], float32, float16, bfloat16 or float64, any strides.
        key: [B, Hkv, Tk, D], same dtype and device; Hq must be a multiple of Hkv.
        top_blocks: blocks per tile, the whole budget.
        block_size: keys per block.
        query_tile: queries that share a choice; 1 gives each query its own.
        pool: "mean" or "bound".
        is_causal, causal_offset, key_lengths, scale, share, backend: as in :func:`topk_select`; heads that share
            rank blocks by the attention mass of the pooled scores. scale must not be negative.

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
    groups = checks.groups_of(share, query.shape[1], key.shape[1])
    count, tiles = -(-key_length // block_size), -(-query_length // query_tile)
    own = _own_blocks(query_tile, block_size, offset) if is_causal else 0
    top_blocks = checks.integer("top_blocks", top_blocks, 1 + own)
    budget = min(top_blocks, count)
    if count == 0 or tiles == 0 or batch == 0:
        return query.new_full((batch, groups, tiles, budget), -1, dtype=torch.int32)

    exists = None
    if key_lengths is not None:
        exists = key_lengths.clamp(0, key_length).to(torch.int64).view(-1, 1, 1, 1)
    blocks = torch.arange(count, device=query.device)
    end = key_length if exists is None else exists
    visible = (blocks * block_size < end).expand(batch if exists is not None else 1, 1, tiles, count)
    queries = _mean(query, query_tile, None)
    if pool == "mean":
        keys = _mean(key, block_size, exists)
    else:
        keys = _extremes(key, block_size, exists)
        queries = torch.cat((queries.clamp(min=0), queries.clamp(max=0)), dim=-1)
    options = {"sinks": 1, "scale": scale, "share": share, "backend": backend}
    if not is_causal:
        return topk_select(queries, keys, budget, attn_mask=visible, **options)

    first = torch.arange(tiles, device=query.device).unsqueeze(-1) * query_tile + offset  # [N, 1]
    last = (first + query_tile - 1).clamp(max=query_length - 1 + offset)
    visible = visible & (blocks * block_size <= last)
    near = visible & (blocks >= first.div(block_size, rounding_mode="floor"))
    far = topk_select(queries, keys, top_blocks - own, attn_mask=visible & ~near, **options)
    # The blocks of a tile's own queries are neighbours: at most `own` from that of its first query on.
    steps = first.div(block_size, rounding_mode="floor") + torch.arange(own, device=query.device)  # [N, own]
    inside = (steps >= 0) & (steps < count)
    steps = steps.clamp(0, count - 1).expand(batch, 1, tiles, own)
    steps = torch.where(inside & near.expand(batch, -1, -1, -1).gather(-1, steps), steps, -1)
    steps = steps.expand(-1, groups, -1, -1)
    return _ascending(torch.cat((far, steps.to(torch.int32)), dim=-1))[..., :budget]


def _own_blocks(tile: int, block: int, offset: int) -> int:
    """The most blocks in which the queries of one tile can lie."""
    if block % tile == 0 and offset % tile == 0:
        return 1
    if tile % block == 0 and offset % block == 0:
        return tile // block
    return (tile - 2) // block + 2


def _ascending(numbers: Tensor) -> Tensor:
    """Rows sorted, −1 last."""
    top = torch.iinfo(numbers.dtype).max
    numbers = torch.where(numbers < 0, top, numbers).sort(-1).values
    return torch.where(numbers == top, -1, numbers)


def _split(rows: Tensor, size: int, exists: Tensor | None) -> tuple[Tensor, Tensor]:
    """rows [B, H, T, D] → ([B, H, pieces, size, D] in float32 or float64, which rows of them exist)."""
    length = rows.shape[2]
    rows = pad(rows.to(torch.promote_types(rows.dtype, torch.float32)), (0, 0, 0, -length % size))
    there = torch.arange(rows.shape[2], device=rows.device).view(1, 1, -1, 1) < (
        length if exists is None else exists
    )
    return rows.unflatten(2, (-1, size)), there.unflatten(2, (-1, size))


def _mean(rows: Tensor, size: int, exists: Tensor | None) -> Tensor:
    """[B, H, pieces, D]: the mean of what exists."""
    if exists is None and rows.shape[2] % size == 0:
        return rows.unflatten(2, (-1, size)).mean(3, dtype=torch.promote_types(rows.dtype, torch.float32))
    rows, there = _split(rows, size, exists)
    return torch.where(there, rows, 0.0).sum(3) / there.sum(3).clamp(min=1)


def _extremes(rows: Tensor, size: int, exists: Tensor | None) -> Tensor:
    """[B, H, pieces, 2·D]: the largest components, then the smallest; 0 where nothing exists."""
    rows, there = _split(rows, size, exists)
    high = torch.where(there, rows, -torch.inf).amax(3)
    low = torch.where(there, rows, torch.inf).amin(3)
    return torch.where(there.any(3), torch.cat((high, low), dim=-1), 0.0)


def refine_blocks(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    blocks: Tensor,  # int32 [B, G, N, M]
    top_k: int,
    *,
    block_size: int = 64,
    query_tile: int = 64,
    is_causal: bool = False,
    causal_offset: int | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
) -> Tensor:
    """Selects for each query the `top_k` best keys by q·k among those of its tile's blocks: indices of tokens.

    Plain PyTorch on every device, a few tiles at a time: M·block_size scores per query. Nothing is differentiated.

    Args:
        query, key, is_causal, causal_offset, key_lengths, scale, share: as in :func:`topk_select`.
        blocks, block_size, query_tile: what :func:`block_select` gave, and what it was given. Its G must be 1, or
            the number of selections that `share` asks for, or Hkv with share="none".
        top_k: keys per query, the whole budget.
        window, sinks: always kept, as far as they lie in the blocks.

    Returns:
        int32 [B, G', Tq, min(top_k, M·block_size, Tk)], G' by `share`, for :func:`gathered_attention`: unique,
        ascending, empty slots −1 at the end. Ties go to the smaller key index.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
        >>> blocks = sparse_attn.block_select(q, k, 4, is_causal=True)
        >>> indices = sparse_attn.refine_blocks(q, k, blocks, 32, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 2, 512, 16])
    """
    query, key = autocast(query, key)
    checks.query_key(query, key)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    blocks = checks.blocks_of(blocks, query, key, query_tile)
    is_causal = checks.boolean("is_causal", is_causal)
    top_k, window, sinks = checks.budget(top_k, window, sinks, is_causal)
    scale = checks.softmax_scale(scale, query.shape[3])
    groups = checks.groups_of(share, query.shape[1], key.shape[1])
    if groups % blocks.shape[1]:
        raise ValueError(
            f"share={share!r} makes {groups} selections, got {blocks.shape[1]} rows of blocks for them"
        )
    offset = checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2])
    key_lengths = checks.lengths_of(key_lengths, key)
    with torch.no_grad():
        return _refine(
            query, key, blocks, top_k, block_size, query_tile, is_causal, offset, key_lengths, scale, window,
            sinks, groups,
        )  # fmt: skip


def _refine(
    query, key, blocks, top_k, size, tile, is_causal, offset, key_lengths, scale, window, sinks, groups
) -> Tensor:
    batch, heads, query_length, _ = query.shape
    kv_heads, key_length = key.shape[1:3]
    device, compute = query.device, torch.promote_types(query.dtype, torch.float32)
    slots = blocks.shape[3]
    budget = min(top_k, slots * size, key_length)
    indices = torch.full((batch, groups, query_length, budget), -1, dtype=torch.int32, device=device)
    if indices.numel() == 0:
        return indices
    blocks = _ascending(torch.where(blocks * size < key_length, blocks, -1)).to(torch.int64)
    again = pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
    blocks = torch.where(again, -1, blocks).repeat_interleave(groups // blocks.shape[1], dim=1)
    units = max(groups, kv_heads)  # each with key rows of its own
    inner = torch.arange(size, device=device)
    keys = key.repeat_interleave(units // kv_heads, dim=1)
    limit = torch.full((1, 1, 1, 1), key_length, device=device)
    if key_lengths is not None:
        limit = key_lengths.clamp(0, key_length).to(torch.int64).view(-1, 1, 1, 1)
    for tiles in query_chunks(blocks.shape[2], batch * heads * slots * size * (tile + query.shape[3]) * 4):
        rows = slice(tiles.start * tile, min(tiles.stop * tile, query_length))
        chosen = blocks[:, :, tiles]
        position = chosen.unsqueeze(-1) * size + inner  # [B, G', n, M, block]
        position = torch.where(chosen.unsqueeze(-1) < 0, key_length, position).flatten(3)  # [B, G', n, C]
        there = position < limit
        place = position.clamp(max=key_length - 1).repeat_interleave(units // groups, dim=1).flatten(2)
        near = keys.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])).to(compute)
        near = near.unflatten(2, position.shape[2:])  # [B, U, n, C, D]
        queries = pad(query[:, :, rows].to(compute), (0, 0, 0, -(rows.stop - rows.start) % tile))
        queries = queries.unflatten(1, (units, -1)).unflatten(3, (-1, tile))  # [B, U, R, n, S, D]
        scores = (queries @ near.unsqueeze(2).mT).flatten(1, 2).flatten(2, 3) * scale  # [B, Hq, t, C]
        scores = scores[:, :, : rows.stop - rows.start]
        token, there = (
            t.repeat_interleave(tile, dim=2)[:, :, : rows.stop - rows.start] for t in (position, there)
        )
        kept = token < sinks
        if is_causal:
            last = torch.arange(rows.start, rows.stop, device=device).unsqueeze(-1) + offset
            there = there & (token <= last)
            kept = kept | (token > last - window)
        if groups < heads:
            scores = _mass(scores.unflatten(1, (groups, -1)), there)
        best = best_of(scores, there, kept & there, budget).to(torch.int64)
        token = token.gather(-1, best.clamp(min=0))
        indices[:, :, rows] = torch.where(best < 0, -1, token).to(torch.int32)
    return indices
