"""`block_tail`, forward: attention to the means of blocks, each with the weight of its keys that were not chosen.

How many those are is counted by bits: a kernel sets one bit per chosen key in the words of its block (8 bytes for 64
keys and query), and the attention kernel takes the words beside the means. The words of a chunk of queries are there
at once: `SCRATCH_BYTES` at most, at any length.

Floor: a dense attention to Tk / 64 keys. T = 32k, 16 heads, D = 128, causal: 0.07 TFLOP, and 8 bytes per query, group
and block: 1 GB from the second-level cache where each head has a selection of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.common import LOG2E, grid_of
from .lib.soft_cap import factors
from .lib.tile_attention import launch_attend
from .lib.tile_rows import Shape, mark_chosen, strides, visibility

SCRATCH_BYTES = 1 << 26  # of words


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
    for first, chunk, words in words_of(indices, shape, block_size):
        launch_attend(
            query, value, shape, 1, chunk * shape.shared, sink_logits=None, out=out, lse=lse, slots=0,
            **arguments(key, words, shape, rule, key_length, block_size, first, chunk),
        )  # fmt: skip
    return out, lse


def arguments(
    key: Tensor,
    words: Tensor,
    shape: Shape,
    rule: PackedRule,
    key_length: int,
    block_size: int,
    first: int,
    chunk: int,
) -> dict[str, object]:
    """What forward and backward hand to their kernels alike."""
    factor, bound = factors(rule.scale, rule.softcap, LOG2E)
    return {
        "key": key, "words": words, **strides("key", key), "blocks": None, **dict.fromkeys(
            ("blocks_b", "blocks_g", "blocks_n", "blocks_m"), 0
        ),
        **visibility(rule, shape.query_length, key_length), "chunk": chunk, "first_query": first,
        "query_tile": chunk, "block_size": shape.key_rows, "factor": factor, "bound": bound, "UNIT": block_size,
    }  # fmt: skip


def words_of(
    indices: Tensor,  # int32 [B, G, Tq, K]
    shape: Shape,
    block_size: int,
) -> Iterator[tuple[int, int, Tensor]]:
    """(first query, number of queries, int32 [B, G, chunk, M · words] bits of their chosen keys), chunk by chunk."""
    width = shape.key_rows * triton.cdiv(block_size, 32)
    lists = shape.batch * shape.groups
    chunks = triton.cdiv(shape.query_length, max(1, SCRATCH_BYTES // (4 * width * lists)))
    chunk = triton.cdiv(shape.query_length, chunks)
    for first in range(0, shape.query_length, chunk):
        some = min(chunk, shape.query_length - first)
        words = indices.new_zeros((shape.batch, shape.groups, some, width), dtype=torch.int32)
        mark_chosen[grid_of(some, lists)](
            words, indices, *indices.stride(), lists, shape.groups, first, indices.shape[3],
            shape.key_rows * block_size, width, UNIT=block_size, BLOCK_K=128, num_warps=1,
        )  # fmt: skip
        yield first, some, words
