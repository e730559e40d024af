"""Packed sequences in whole blocks: `block_select` and `block_attention` of each, in one call.

The sequences are laid out anew with each at the beginning of a tile and of a block, which costs a copy and at most one
tile and one block a sequence; then a packed call is a call of the same ops with one batch entry, in which each query
has a first key and a causal offset of its own. Sizes follow from those of the tensors, so a graph serves all packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks import packed as check
from sparse_attn.ops import block_attention
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.block_select import POOLS, keeping_the_first, own_blocks, pooled
from sparse_attn.ops.shards import shardable
from sparse_attn.ops.topk_select import ascending, select
from sparse_attn.rule import Rule


class Pieces:
    """Where the tokens of packed sequences lie when each sequence begins a piece of `size` tokens."""

    def __init__(self, cu_seq: Tensor, length: int, size: int) -> None:
        bounds = cu_seq.to(torch.int64).clamp(0, length)
        device, sequences = cu_seq.device, cu_seq.shape[0] - 1
        self.size = min(size, max(1, length))  # a longer one would be filled up
        self.count = length // self.size + sequences + 1  # the last is of no sequence
        self.lengths = torch.cat(
            (bounds.diff().clamp(min=0), bounds.new_zeros(1))
        )  # [S + 1]; behind the last none
        begins = ((self.lengths + self.size - 1) // self.size).cumsum(0)
        # [S + 1]: the first piece of each sequence; behind the last one the piece that is always empty.
        self.begins = torch.cat((bounds.new_zeros(1), begins[:-1]))
        self.begins[-1:] = self.count - 1
        pieces = torch.arange(self.count, device=device)
        self.sequence = torch.bucketize(pieces, begins[:sequences], right=True)  # [pieces]
        # Of each place in the pieces: its token, and whether there is one.
        places = torch.arange(self.count * self.size, device=device)
        own = self.sequence[places // self.size]
        self.position = places - self.begins[own] * self.size  # within its sequence
        self.there = (self.position >= 0) & (self.position < self.lengths[own])
        firsts = torch.cat((bounds[:-1], bounds.new_zeros(1)))
        self.source = torch.where(self.there, firsts[own] + self.position, 0)
        # Of each token: its place, that of no token where it is of no sequence.
        tokens = torch.arange(length, device=device)
        own = torch.bucketize(tokens, bounds[1:], right=True)
        self.place = self.begins[own] * self.size + torch.where(own < sequences, tokens - firsts[own], 0)

    def lay(self, rows: Tensor) -> Tensor:
        """[T, H, …] → [1, H, places, …], 0 where there is no token."""
        if rows.shape[0] == 0:  # a row to take for none, which keeps the gradient's way
            rows = torch.cat((rows, rows.new_zeros((1, *rows.shape[1:]))))
        there = self.there.view(-1, *[1] * (rows.dim() - 1))
        return torch.where(there, rows.index_select(0, self.source), 0).transpose(0, 1)[None]

    def back(self, rows: Tensor) -> Tensor:
        """[1, H, places, …] → [T, H, …]."""
        return rows[0].index_select(1, self.place).transpose(0, 1)


def _pieces(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    block_size: int,
    query_tile: int,
) -> tuple[Pieces, Pieces, int]:
    check.packed_tensor("query", query, "[T, Hq, D]")
    check.packed_tensor("key", key, "[Tk, Hkv, D]")
    check.offsets("cu_seq_q", cu_seq_q, query, "max_q", max_q)
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    longest, _ = check.offsets("cu_seq_k", cu_seq_k, key, "max_k", max_k)
    check.same_sequences(cu_seq_q, cu_seq_k)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    tiles, blocks = Pieces(cu_seq_q, query.shape[0], query_tile), Pieces(cu_seq_k, key.shape[0], block_size)
    return tiles, blocks, longest


@shardable("query:THD key:SHD sink_logits:H", "NGM")
def varlen_block_select(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    top_blocks: int,
    *,
    block_size: int = 64,
    query_tile: int = 64,
    pool: str = "mean",
    is_causal: bool = False,
    scale: float | None = None,
    share: str = "none",
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:  # int32 [N, G, M]
    r""":func:`block_select` of packed sequences: tiles and blocks are counted from the start of each sequence.

    Args:
        query, key, cu_seq_q, cu_seq_k, max_q, max_k: as in :func:`varlen_topk_select`.
        is_causal: a query sees the keys up to its own; cu_seq_k must be cu_seq_q (or None).
        top_blocks, block_size, query_tile, pool, scale, share, softcap, sink_logits, backend: as in
            :func:`block_select`.

    Returns:
        int32 [N, G, M]: a row for each tile, those of a sequence behind those of the one before it, and rows of −1
        behind the last; N = ⌊T / query_tile⌋ + S + 1 (query_tile at most T), M the smaller of top_blocks and the
        blocks of max_k keys. Numbers count the blocks of the tile's own sequence, and are what `block_select` gives
        for the sequence alone.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(300, 4, 16), torch.randn(300, 2, 16)
        >>> cu_seq = torch.tensor([0, 100, 300])  # tiles 0 and 1, then 2 … 5
        >>> sparse_attn.varlen_block_select(q, k, cu_seq, None, 200, 200, 3, is_causal=True).shape
        torch.Size([7, 4, 3])
    """
    query, key = autocast(query, key)
    tiles, blocks, longest = _pieces(query, key, cu_seq_q, cu_seq_k, max_q, max_k, block_size, query_tile)
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, got {checks.describe(pool)}")
    scale = checks.softmax_scale(scale, query.shape[2])
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    if checks.boolean("is_causal", is_causal):
        check.one_cu_seq(cu_seq_q, cu_seq_k)
    own = own_blocks(query_tile, block_size, 0) if is_causal else 0
    top_blocks = checks.integer("top_blocks", top_blocks, 1 + own)
    width = min(top_blocks, -(-min(longest, key.shape[0]) // block_size))

    queries = pooled(tiles.lay(query), tiles.there, tiles.size, "mean")
    keys = pooled(blocks.lay(key), blocks.there, blocks.size, pool)
    if pool == "bound":
        queries = torch.cat((queries.clamp(min=0), queries.clamp(max=0)), dim=-1)
    begin = blocks.begins[tiles.sequence]  # [N]: the first block of a tile's sequence
    numbers = torch.arange(tiles.count, device=query.device)
    tile = numbers - tiles.begins[tiles.sequence]  # within its sequence
    count = (blocks.lengths[tiles.sequence] + blocks.size - 1) // blocks.size  # blocks of its sequence
    first = tile * tiles.size // blocks.size  # of the tile's own blocks, if it is causal
    last = begin + (torch.minimum(first, count) if is_causal else count) - 1
    rule = keeping_the_first(
        is_causal=True, causal_offset=(last - numbers)[None], key_starts=begin[None], share=share, scale=scale,
        softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    found = select(queries, keys, top_blocks - own, rule, backend=backend, function="varlen_block_select")
    found = torch.where(found >= 0, found - begin.view(1, 1, -1, 1), -1).to(torch.int32)
    if is_causal:
        steps = first.unsqueeze(-1) + torch.arange(min(own, blocks.count), device=query.device)  # [N, own]
        end = torch.minimum((tile + 1) * tiles.size, tiles.lengths[tiles.sequence]).unsqueeze(-1)
        steps = torch.where(steps * blocks.size < end, steps, -1).to(torch.int32)
        found = torch.cat((found, steps.expand(1, found.shape[1], -1, -1)), dim=-1)
    found = ascending(found)[0].transpose(0, 1)
    missing = max(0, width - found.shape[-1])
    return torch.nn.functional.pad(found, (0, missing), value=-1)[..., :width].contiguous()


@shardable("query:THD key:SHD value:SHD blocks:NGM sink_logits:H", "THD TH")
def varlen_block_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    blocks: Tensor,  # int [N, G, M]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    *,
    block_size: int = 64,
    query_tile: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`block_attention` of packed sequences, differentiable: tiles and blocks are counted within each sequence.

    Args:
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: as in :func:`varlen_topk_attention`; queries of no
            sequence see nothing.
        blocks: int32 or int64 [N, G, M], as :func:`varlen_block_select` gives it. What is negative, or no block of
            the tile's sequence, is an empty slot.
        is_causal: the last query of a sequence sees its last key, the one before it one key less, and so on.
        block_size, query_tile, scale, softcap, sink_logits, return_lse, backend: as in :func:`block_attention`.

    Returns:
        out [T, Hq, Dv]; with return_lse (out, lse float32 [T, Hq]).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(300, 4, 16, requires_grad=True) for _ in range(3))
        >>> cu_seq, sizes = torch.tensor([0, 100, 300]), (200, 200)
        >>> blocks = sparse_attn.varlen_block_select(q, k, cu_seq, None, *sizes, 3, is_causal=True)
        >>> out = sparse_attn.varlen_block_attention(q, k, v, blocks, cu_seq, None, *sizes, is_causal=True)
        >>> out.sum().backward()
    """
    return_lse = checks.boolean("return_lse", return_lse)
    is_causal = checks.boolean("is_causal", is_causal)
    tiles, of_keys, _ = _pieces(query, key, cu_seq_q, cu_seq_k, max_q, max_k, block_size, query_tile)
    check.packed_value(value, key)
    check.packed_blocks(blocks, query, key, tiles.count)
    begin = of_keys.begins[tiles.sequence]  # [N]: the first block of a tile's sequence
    end = (of_keys.lengths[tiles.sequence] + of_keys.size - 1) // of_keys.size
    inside = (blocks >= 0) & (blocks < end.view(-1, 1, 1))
    chosen = torch.where(inside, blocks + begin.view(-1, 1, 1), -1).to(torch.int32).transpose(0, 1)[None]
    own = tiles.sequence.repeat_interleave(tiles.size)  # [places]: the sequence of each
    first, keys = of_keys.begins[own] * of_keys.size, of_keys.lengths[own]
    places = torch.arange(len(own), device=query.device)
    # The last query sees the last key; or each query does.
    last = first + keys - 1 + (tiles.position - tiles.lengths[own] + 1 if is_causal else 0)
    first = torch.where(tiles.there, first, len(of_keys.source))
    rule = Rule(
        True,
        (last - places)[None],
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        key_starts=first[None],
    )
    q, k, v = tiles.lay(query), of_keys.lay(key), of_keys.lay(value)
    out, lse = block_attention.attend(
        q, k, v, chosen, of_keys.size, tiles.size, rule, backend=backend, function="varlen_block_attention"
    )
    found = tiles.back(out)
    return (found, tiles.back(lse)) if return_lse else found
