"""`block_tail`, backward: as in `block_attention`, of all means (lib/tile_gradients.py).

There are few means, so the queries are cut into pieces that fill a device; each has a dK and dV of its own, and they
are added in order. The number of pieces follows from the shape alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .block_tail import arguments, words_of
from .lib.common import grid_of
from .lib.tile_attention import launch
from .lib.tile_gradients import key_configs, query_configs, tile_keys, tile_queries
from .lib.tile_rows import Shape, strides
from .lib.tuning import run_tuned, size_class

PROGRAMS = 512  # a few for each multiprocessor of a large device
SMALLEST = 512  # rows of a piece


def block_tail_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    key_length: int,
    block_size: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    shape = Shape.of(query, key, value, indices.shape[1], key.shape[1])
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    if grad_out.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.to(key.dtype), grad_value.to(value.dtype)
    both = {
        "grad_out": grad_out, **strides("grad", grad_out), "value": value, **strides("value", value),
        "lse": lse.contiguous(), "deltas": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "scale": rule.scale, "slots": 0,
    }  # fmt: skip
    for first, chunk, words in words_of(indices, shape, block_size):
        rows = chunk * shape.shared
        sizes = rows, query.dtype, shape.dim, shape.value_dim, shape.key_rows
        of_chunk = both | arguments(key, words, shape, rule, key_length, block_size, first, chunk)
        launch(
            "block_tail_backward queries", tile_queries, query_configs(*sizes), query, shape, 1, rows,
            grad_lse=None if grad_lse is None else grad_lse.contiguous(), out=out.contiguous(),
            grad_query=grad_query, **of_chunk,
        )  # fmt: skip
        of_chunk = {n: v for n, v in of_chunk.items() if not n.startswith("blocks")}
        for total, found in zip(
            (grad_key, grad_value), _of_keys(query, key, value, shape, rows, sizes, of_chunk), strict=True
        ):
            total += found
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _of_keys(
    query: Tensor, key: Tensor, value: Tensor, shape: Shape, rows: int, sizes: tuple, of_chunk: dict
):
    """dK and dV of one chunk of queries, float32."""
    lists = shape.batch * shape.kv_heads

    def run(config: dict[str, int]) -> tuple[Tensor, Tensor]:
        parts = triton.cdiv(shape.key_rows, config["BLOCK_K"])
        pieces = max(1, min(PROGRAMS // (lists * parts), triton.cdiv(rows, SMALLEST)))
        found = tuple(
            torch.empty((pieces, *t.shape), dtype=torch.float32, device=t.device) for t in (key, value)
        )
        tile_keys[grid_of(parts, pieces * lists)](
            query=query, **strides("query", query), order=None, offsets=None, grad_key=found[0], grad_value=found[1],
            programs=pieces * lists, units=shape.units, shared=shape.shared, kv_heads=shape.kv_heads,
            groups=shape.groups, query_length=shape.query_length, key_rows=shape.key_rows, subs=1, parts=parts,
            pieces=pieces, piece=triton.cdiv(triton.cdiv(rows, pieces), config["BLOCK_M"]) * config["BLOCK_M"],
            **of_chunk, **shape.dims(), **config,
        )  # fmt: skip
        return tuple(t.sum(0) for t in found)

    return run_tuned(
        "block_tail_backward keys",
        (query.dtype, shape.shared, shape.dim, shape.value_dim, size_class(rows), size_class(lists)),
        key_configs(*sizes),
        run,
        query.device,
    )
