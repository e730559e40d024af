"""Definition of `refine_blocks`: topk_select under the mask that the blocks make."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.topk_select import products, select


def refine_blocks(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    blocks: Tensor,  # int32 [B, G, N, M]
    key_lengths: Tensor | None,  # int [B]
    top_k: int,
    block_size: int,
    query_tile: int,
    is_causal: bool,
    causal_offset: int,
    scale: float,
    window: int,
    sinks: int,
    groups: int,  # G: 1, Hkv or Hq
) -> Tensor:  # int32 [B, G, Tq, K]
    keys = key.to(torch.promote_types(query.dtype, torch.float32))

    def scores(rows: slice) -> Tensor:
        return products(query[:, :, rows].to(keys.dtype), keys) * scale

    mask = _InBlocks(blocks, key.shape[2], block_size, query_tile, is_causal, causal_offset, window, sinks)
    return select(
        scores, query, key, mask, key_lengths, top_k, is_causal, causal_offset, window, sinks, groups
    )


class _InBlocks:
    """A mask [B, G, Tq, Tk] that is made for the queries it is asked for: keys of the blocks, and those always kept."""

    def __init__(
        self, blocks, length, block_size, query_tile, is_causal, causal_offset, window, sinks
    ) -> None:
        self.blocks, self.tile = blocks, query_tile
        self.size, self.count = block_size, -(-length // block_size)
        self.position = torch.arange(length, device=blocks.device)
        self.is_causal, self.offset, self.window, self.sinks = is_causal, causal_offset, window, sinks

    def __getitem__(self, where: tuple[slice, slice, slice]) -> Tensor:
        queries = torch.arange(where[2].start, where[2].stop, device=self.blocks.device)
        rows = self.blocks[:, :, queries // self.tile]  # [B, G, t, M]
        rows = torch.where((rows >= 0) & (rows < self.count), rows, self.count).to(torch.int64)
        chosen = torch.zeros((*rows.shape[:3], self.count + 1), dtype=torch.bool, device=rows.device)
        chosen.scatter_(-1, rows, torch.ones_like(rows, dtype=torch.bool))
        inside = chosen[..., self.position // self.size] | (self.position < self.sinks)
        if self.is_causal:
            inside = inside | (self.position > queries.unsqueeze(-1) + self.offset - self.window)
        return inside
