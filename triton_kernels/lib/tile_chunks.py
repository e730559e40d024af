"""The chosen keys as bits, some queries at a time, and the gradients of keys that are summed over those chunks.

How many chunks and pieces there are follows from the shape alone, and they are added in order: one result, always.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .common import LOG2E, grid_of
from .key_gradients import key_configs, tile_keys
from .query_gradients import query_configs, tile_queries
from .soft_cap import factors
from .tile_attention import launch
from .tile_rows import Shape, mark_chosen, strides, visibility
from .tuning import run_tuned, size_class

SCRATCH_BYTES = 1 << 26  # of words
PROGRAMS = 512  # a few for each multiprocessor of a large device
SMALLEST = 512  # rows of a piece


def words_of(
    indices: Tensor,  # int32 [B, G, Tq, K]
    shape: Shape,
    unit: int,  # keys whose bits begin a word
    keys: int,  # that have bits
) -> Iterator[tuple[int, int, Tensor]]:
    """(first query, number of queries, int32 [B, G, chunk, words] bits of their chosen keys), chunk by chunk."""
    width = triton.cdiv(keys, unit) * triton.cdiv(unit, 32)
    lists = shape.batch * shape.groups
    chunks = triton.cdiv(shape.query_length, max(1, SCRATCH_BYTES // (4 * width * lists)))
    chunk = triton.cdiv(shape.query_length, chunks)
    for first in range(0, shape.query_length, chunk):
        some = min(chunk, shape.query_length - first)
        words = indices.new_zeros((shape.batch, shape.groups, some, width), dtype=torch.int32)
        mark_chosen[grid_of(some, lists)](
            words, indices, *indices.stride(), lists, shape.groups, first, indices.shape[3], keys, width, UNIT=unit,
            BLOCK_K=128, num_warps=1,
        )  # fmt: skip
        yield first, some, words


def arguments(
    key: Tensor,
    words: Tensor,
    shape: Shape,
    rule: PackedRule,
    key_length: int,
    unit: int,  # keys that a row of keys stands for
    first: int,
    chunk: int,
) -> dict[str, object]:
    """What forward and backward hand to their kernels alike, for one chunk of queries beside all rows of keys."""
    factor, bound = factors(rule.scale, rule.softcap, LOG2E)
    return {
        "key": key, "words": words, **strides("key", key), "blocks": None, **dict.fromkeys(
            ("blocks_b", "blocks_g", "blocks_n", "blocks_m"), 0
        ),
        **visibility(rule, shape.query_length, key_length), "chunk": chunk, "first_query": first,
        "query_tile": chunk, "block_size": shape.key_rows, "factor": factor, "bound": bound, "UNIT": unit,
    }  # fmt: skip


def gradients(
    name: str,
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, N, D]: rows of keys
    value: Tensor,  # [B, Hkv, N, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    outside: Tensor | None,  # float32 [B, Hq, Tq] with MEAN
    key_length: int,
    unit: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    shape = Shape.of(query, key, value, indices.shape[1], key.shape[1])
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    if grad_out.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.to(key.dtype), grad_value.to(value.dtype)
    mean = outside is not None
    both = {
        "grad_out": grad_out, **strides("grad", grad_out), "value": value, **strides("value", value),
        "lse": lse.contiguous(), "deltas": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "tails": lse.new_empty((2, *lse.shape)) if mean else None, "scale": rule.scale, "slots": 0, "MEAN": mean,
    }  # fmt: skip
    of_queries = {
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(), "out": out.contiguous(),
        "outside": outside.contiguous() if mean else None, "grad_query": grad_query,
    }  # fmt: skip
    bits, keys = (32, key_length) if mean else (unit, shape.key_rows * unit)
    for first, chunk, words in words_of(indices, shape, bits, keys):
        rows = chunk * shape.shared
        sizes = rows, query.dtype, shape.dim, shape.value_dim, shape.key_rows
        of_chunk = both | arguments(key, words, shape, rule, key_length, unit, first, chunk)
        launch(
            f"{name} queries", tile_queries, query_configs(*sizes, mean), query, shape, 1, rows, **of_queries,
            **of_chunk,
        )  # fmt: skip
        of_chunk = {n: v for n, v in of_chunk.items() if not n.startswith("blocks")}
        found = _of_keys(name, query, key, value, shape, rows, sizes, of_chunk)
        for total, part in zip((grad_key, grad_value), found, strict=True):
            total += part
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _of_keys(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Shape,
    rows: int,
    sizes: tuple,
    of_chunk: dict,
) -> tuple[Tensor, ...]:
    """dK and dV of one chunk of queries, float32."""
    lists = shape.batch * shape.kv_heads

    def run(config: dict[str, int]) -> tuple[Tensor, ...]:
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
        return tuple(t[0] if pieces == 1 else t.sum(0) for t in found)

    return run_tuned(
        f"{name} keys",
        (query.dtype, shape.shared, shape.dim, shape.value_dim, size_class(rows), size_class(lists)),
        key_configs(*sizes, counted=True, mean=of_chunk["MEAN"]),
        run,
        query.device,
    )
