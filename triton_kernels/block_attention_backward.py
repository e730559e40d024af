"""`block_attention`, backward: dQ tile by tile (lib/query_gradients.py), dK and dV block by block (key_gradients.py).

The tiles of queries that chose a block are a list (lib/key_lists.py). The first block,
which all tiles keep, has the longest: as much work as one block is in the backward of dense attention.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .block_attention import sizes_of
from .lib.common import LOG2E, grid_of
from .lib.key_gradients import key_configs, tile_keys
from .lib.key_lists import key_lists
from .lib.query_gradients import query_configs, tile_queries
from .lib.soft_cap import factors
from .lib.tile_attention import launch
from .lib.tile_rows import Shape, strides, visibility
from .lib.tuning import run_tuned, size_class


def block_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    blocks: Tensor,  # int32 [B, G, N, M]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    block_size: int,
    query_tile: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key and value
    shape = Shape.of(query, key, value, blocks.shape[1], max(blocks.shape[1], key.shape[1]))
    grads = tuple(t.new_empty(t.shape) for t in (query, key, value))
    if grad_out.numel() == 0 or blocks.numel() == 0 or key.numel() == 0:
        return tuple(g.zero_() for g in grads)
    block_size, query_tile = sizes_of(shape, block_size, query_tile)
    tiles, rows = triton.cdiv(shape.query_length, query_tile), query_tile * shape.shared
    factor, bound = factors(rule.scale, rule.softcap, LOG2E)
    lse, deltas = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    both = {
        "grad_out": grad_out, **strides("grad", grad_out), "key": key, **strides("key", key), "value": value,
        **strides("value", value), **visibility(rule, shape.query_length, shape.key_rows), "words": None, "lse": lse,
        "deltas": deltas, "chunk": shape.query_length, "first_query": 0, "query_tile": query_tile,
        "block_size": block_size, "slots": blocks.shape[3], "factor": factor, "bound": bound, "scale": rule.scale,
        "tails": None, "UNIT": 1, "MEAN": False,
    }  # fmt: skip
    sizes = rows, query.dtype, shape.dim, shape.value_dim, block_size
    launch(
        "block_attention_backward queries", tile_queries, query_configs(*sizes), query, shape, tiles, rows,
        grad_lse=None if grad_lse is None else grad_lse.contiguous(), blocks=blocks,
        **strides("blocks", blocks, "bgnm"), out=out.contiguous(), outside=None, grad_query=grads[0],
        **both,
    )  # fmt: skip
    count = triton.cdiv(shape.key_rows, block_size)
    order, offsets = key_lists(blocks, count)
    programs = shape.batch * shape.kv_heads

    def run(config: dict[str, int]) -> None:
        parts = triton.cdiv(block_size, config["BLOCK_K"])
        tile_keys[grid_of(count * parts, programs)](
            query=query, **strides("query", query), order=order, offsets=offsets, grad_key=grads[1],
            grad_value=grads[2], programs=programs, units=shape.units, shared=shape.shared,
            kv_heads=shape.kv_heads, groups=shape.groups, query_length=shape.query_length, key_rows=shape.key_rows,
            subs=triton.cdiv(rows, config["BLOCK_M"]), parts=parts, pieces=1, piece=0, **both, **shape.dims(), **config,
        )  # fmt: skip

    run_tuned(
        "block_attention_backward keys",
        (
            query.dtype,
            shape.shared,
            shape.dim,
            shape.value_dim,
            size_class(rows),
            size_class(count * programs),
        ),
        key_configs(*sizes),
        run,
        query.device,
    )
    return grads
