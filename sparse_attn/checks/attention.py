"""Checks of the tensors of attention, and of the selections that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.checks.values import FLOAT_DTYPES, dense, describe, has_values

_SDPA = torch.nn.functional.scaled_dot_product_attention


class Served:
    """Whether the call that runs is one over ranks (sparse_attn.distributed), which knows what parts it has."""

    over_ranks = False


def _attention_tensor(name: str, value: object, axes: str) -> torch.Size:
    """Its shape, read once: each reading of a tensor's shape costs a call as much as several comparisons."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {describe(value)}")
    shape = value.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions {axes}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {describe(value)}")
    dense(name, value)
    if shape[3] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, got {describe(value)}")
    return shape


def query_key(query: Tensor, key: Tensor) -> None:
    """query [B, Hq, Tq, D] and key [B, Hkv, Tk, D]."""
    if torch.nn.functional.scaled_dot_product_attention is not _SDPA and not Served.over_ranks:
        _outside_context_parallel()
    batch, heads, _, dim = _attention_tensor("query", query, "[B, Hq, Tq, D]")
    key_batch, kv_heads, _, key_dim = _attention_tensor("key", key, "[B, Hkv, Tk, D]")
    if key.dtype != query.dtype:
        raise TypeError(f"query and key must have one dtype, got query {query.dtype} and key {key.dtype}")
    if key.device != query.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    if key_batch != batch:
        raise ValueError(
            f"query and key must have one batch size, got query {list(query.shape)} and key {list(key.shape)}"
        )
    if key_dim != dim:
        raise ValueError(
            "query and key must have one head dimension D (the last), "
            f"got query {list(query.shape)} and key {list(key.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads != 0 or heads == 0:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the number of key heads, "
            f"got {heads} query heads and {kv_heads} key heads"
        )


def keys(name: str, key: object) -> None:
    """key [B, Hkv, Tk, D], by itself."""
    _attention_tensor(name, key, "[B, Hkv, Tk, D]")


def sequences(name: str, numbers: object, batch: int, device: torch.device) -> Tensor:
    """Which sequences of a batch, int64 [B']; values are read on the CPU alone."""
    if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int64 (or int32) tensor of shape [B], got {describe(numbers)}")
    if numbers.dim() != 1 or numbers.device != device:
        raise ValueError(
            f"{name} must have shape [B] and be on {device}, got {describe(numbers)} on {numbers.device}"
        )
    if device.type == "cpu" and has_values(numbers) and numbers.numel():
        low, high = (int(n) for n in numbers.aminmax())
        if low < 0 or high >= batch:
            raise IndexError(f"{name} must name sequences 0 … {batch - 1}, got {low if low < 0 else high}")
    return numbers.to(torch.int64)


def _outside_context_parallel() -> None:
    """torch's context_parallel puts a function of its own in the place of scaled_dot_product_attention, of no other."""
    now = torch.nn.functional.scaled_dot_product_attention
    if getattr(now, "__module__", "").endswith("_context_parallel._attention"):
        raise NotImplementedError(
            "sparse_attn does not work inside torch's context_parallel, which splits the sequence over ranks for "
            "scaled_dot_product_attention alone: each rank would select among its own keys; "
            "sparse_attn.distributed.context_parallel inside it does (docs/distributed.md#context-parallel)"
        )


def value_of(key: Tensor, value: Tensor) -> None:
    """value [B, Hkv, Tk, Dv] beside key [B, Hkv, Tk, D]."""
    shape = _attention_tensor("value", value, "[B, Hkv, Tk, Dv]")
    if value.dtype != key.dtype:
        raise TypeError(f"key and value must have one dtype, got key {key.dtype} and value {value.dtype}")
    if value.device != key.device:
        raise ValueError(f"key and value must be on one device, got {key.device} and {value.device}")
    if shape[:3] != key.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, heads and length (the first three dimensions), "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )


def indexer_weights(weights: object, query: Tensor) -> Tensor:
    """weights [B, G·Hi, Tq] beside the indexer's query [B, G·Hi, Tq, D], as float32 (float64 for float64)."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape [B, G·Hi, Tq], got {describe(weights)}")
    if weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weights must be float32, float16, bfloat16 or float64, got {describe(weights)}")
    dense("weights", weights)
    if weights.shape != query.shape[:3]:
        raise ValueError(
            "weights must have the shape of query's first three dimensions, "
            f"[B, G·Hi, Tq] = {list(query.shape[:3])}, got {describe(weights)}"
        )
    if weights.device != query.device:
        raise ValueError(f"weights must be on the query's device {query.device}, got {weights.device}")
    return weights.to(torch.promote_types(query.dtype, torch.float32))


def indices_of(indices: object, query: Tensor, key: Tensor) -> Tensor:
    """indices as int32 [B, G, Tq, K]."""
    given = indices.unsqueeze(1) if isinstance(indices, Tensor) and indices.dim() == 3 else indices
    axes = "[B, G, Tq, K] with G one of 1, Hkv, Hq, or [B, Tq, K]"
    return _numbers("indices", given, query, key, query.shape[2], "[B, G, Tq, K]", axes, "Tq")


def blocks_of(blocks: object, query: Tensor, key: Tensor, query_tile: int) -> Tensor:
    """blocks as int32 [B, G, N, M], N = ⌈Tq / query_tile⌉."""
    tiles = -(-query.shape[2] // query_tile)
    axes = "[B, G, N, M] with G one of 1, Hkv, Hq and N = ⌈Tq / query_tile⌉"
    return _numbers("blocks", blocks, query, key, tiles, "[B, G, N, M]", axes, "N")


def _numbers(
    name: str,
    numbers: object,
    query: Tensor,
    key: Tensor,
    rows: int,  # the third dimension
    shape: str,
    axes: str,  # the shape, explained
    rows_name: str,  # not their number: a size in a text would be a constant of a compiled graph
) -> Tensor:
    """Numbers of keys or of blocks as int32, of the shape that they must have."""
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name} must be an int32 tensor of shape {shape}, got {describe(numbers)}")
    if numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {describe(numbers)}")
    dense(name, numbers)
    if numbers.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {numbers.device}")
    (batch, heads), kv_heads = query.shape[:2], key.shape[1]
    fits = numbers.dim() == 4 and numbers.shape[0] == batch and numbers.shape[2] == rows
    if not fits or numbers.shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"{name} must have shape {axes}; "
            f"here B={batch}, Hkv={kv_heads}, Hq={heads}, {rows_name}={rows}, got {describe(numbers)}"
        )
    if numbers.dtype == torch.int64:
        # A number past 2^31 must not wrap around into range; none is as large as the number of keys.
        numbers = torch.where((numbers >= 0) & (numbers < key.shape[2]), numbers, -1).to(torch.int32)
    return numbers
