"""`block_tail`, forward: attention to the means of blocks, each with the weight of its keys that were not chosen.

How many those are is counted by bits: a kernel sets one bit per chosen key in the words of its block (8 bytes for 64
keys and query), and the attention kernel takes the words beside the means. The words of a chunk of queries are there
at once: `SCRATCH_BYTES` of lib/tile_chunks.py at most, at any length.

Floor: a dense attention to Tk / 64 keys. T = 32k, 16 heads, D = 128, causal: 0.07 TFLOP, and 8 bytes per query, group
and block: 1 GB from the second-level cache where each head has a selection of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.tile_attention import launch_attend
from .lib.tile_chunks import arguments, words_of
from .lib.tile_rows import Shape


def block_tail(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]: means of blocks
    value: Tensor,  # [B, Hkv, M, Dv]: likewise
    indices: Tensor,  # int32 [B, G, Tq, K]: keys
    key_length: int,
    block_size: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    shape = Shape.of(query, key, value, indices.shape[1], key.shape[1])
    out = query.new_empty((*query.shape[:3], shape.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if shape.key_rows == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    for first, chunk, words in words_of(indices, shape, block_size, shape.key_rows * block_size):
        launch_attend(
            query, value, shape, 1, chunk * shape.shared, sink_logits=None, out=out, lse=lse, slots=0,
            **arguments(key, words, shape, rule, key_length, block_size, first, chunk),
        )  # fmt: skip
    return out, lse
