"""`block_attention`, forward: tiles of queries beside the blocks that they chose, in matrix products.

Floor: the products. M blocks of 64 keys cost 2 · 64 · M · (D + Dv) multiply-adds per query and head, whatever the
context (T = 32k, M = 16, D = 128, 16 heads: 0.27 TFLOP, 0.5 ms at 600 TFLOP/s); a tile of queries reads each block
once for all heads that share it. The kernel stands in lib/tile_attention.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.common import LOG2E
from .lib.soft_cap import factors
from .lib.tile_attention import launch_attend
from .lib.tile_rows import Shape, strides, visibility


def block_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    blocks: Tensor,  # int32 [B, G, N, M]
    block_size: int,
    query_tile: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    shape = Shape.of(query, key, value, blocks.shape[1], max(blocks.shape[1], key.shape[1]))
    out = query.new_empty((*query.shape[:3], shape.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block_size, query_tile = sizes_of(shape, block_size, query_tile)
    factor, bound = factors(rule.scale, rule.softcap, LOG2E)
    launch_attend(
        query, value, shape, triton.cdiv(shape.query_length, query_tile), query_tile * shape.shared, block_size,
        key=key, blocks=blocks, words=None, sink_logits=rule.sink_logits, out=out, lse=lse, **strides("key", key),
        **strides("blocks", blocks, "bgnm"), **visibility(rule, shape.query_length, shape.key_rows),
        chunk=shape.query_length, first_query=0, query_tile=query_tile, slots=blocks.shape[3], factor=factor,
        bound=bound, UNIT=1,
    )  # fmt: skip
    return out, lse


def sizes_of(shape: Shape, block_size: int, query_tile: int) -> tuple[int, int]:
    """(block_size, query_tile): larger ones than the sequences change nothing."""
    return min(block_size, max(1, shape.key_rows)), min(query_tile, shape.query_length)
