"""`refine_blocks`: from the blocks of a tile of queries to the best of their keys, as indices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast, sizes_of
from sparse_attn.ops.block_select import ascending
from sparse_attn.ops.registry import define
from sparse_attn.wings.base import choose, overload


def fake(query, key, blocks, key_lengths, top_k, *options) -> Tensor:
    budget = torch.sym_min(top_k, key.shape[2])
    return query.new_empty((query.shape[0], options[-1], query.shape[2], budget), dtype=torch.int32)


define(
    "refine_blocks",
    "(Tensor query, Tensor key, Tensor blocks, Tensor? key_lengths, SymInt top_k, SymInt block_size, "
    "SymInt query_tile, bool is_causal, SymInt causal_offset, float scale, SymInt window, SymInt sinks, "
    "SymInt groups) -> Tensor",
    fake,
)


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
    backend: str | None = None,
) -> Tensor:
    """Selects for each query the `top_k` best keys by q·k among those of its tile's blocks: indices of tokens.

    It is :func:`topk_select` under a mask of the blocks, without the mask: heads that share a selection rank keys by
    their mass among these keys. Nothing is differentiated. The CPU wing scores these keys alone.

    Args:
        query, key, top_k, is_causal, causal_offset, key_lengths, scale, share, backend: as in :func:`topk_select`.
        blocks, block_size, query_tile: what :func:`block_select` gave, and what it was given. Its G must divide the
            number of selections that `share` asks for. Numbers out of range are empty slots.
        window, sinks: always kept, in the blocks or not.

    Returns:
        int32 [B, G', Tq, min(top_k, Tk)], G' by `share`, for :func:`gathered_attention`: unique, ascending, empty slots
        −1 at the end. Ties go to the smaller key index.

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
    groups = checks.groups_of(share, query.shape[1], key.shape[1])
    if groups % blocks.shape[1]:
        raise ValueError(
            f"share={share!r} makes {groups} selections, got {blocks.shape[1]} rows of blocks for them"
        )
    blocks = ascending(torch.where(blocks < -(-key.shape[2] // block_size), blocks, -1))
    blocks = torch.where(pad(blocks[..., 1:] == blocks[..., :-1], (1, 0)), -1, blocks)  # each once
    options = (
        checks.lengths_of(key_lengths, key),
        top_k,
        block_size,
        query_tile,
        is_causal,
        checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2]),
        checks.softmax_scale(scale, query.shape[3]),
        window,
        sinks,
        groups,
    )
    wing = choose("refine_blocks", query, backend, **sizes_of(query))
    blocks = blocks.repeat_interleave(groups // blocks.shape[1], dim=1)
    return overload("refine_blocks", wing)(query, key, blocks, *options)
