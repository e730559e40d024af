"""Checks of packed sequences: tensors without a batch dimension, and where each sequence lies in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks.values import bare, describe, has_values, integer


def packed_tensor(name: str, value: object, axes: str) -> None:
    """A tensor of three dimensions; the ops check the rest of it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {describe(value)}")
    if value.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions {axes}, got {describe(value)}")


def offsets(name: str, cu_seq: object, tokens: Tensor, longest_name: str, longest: Any) -> int:
    """cu_seq [S + 1] of sequences that lie end to end in `tokens` [T, …]; returns `longest`, which none passes.

    Values are read on the CPU alone; elsewhere what they say beyond the tokens is never followed.
    """
    _whole_numbers(name, cu_seq, "[S + 1]", tokens)
    assert isinstance(cu_seq, Tensor)
    if cu_seq.shape[0] < 1:
        raise ValueError(f"{name} must have at least one entry, the 0 where sequences begin, got none")
    longest = integer(longest_name, longest, 0)
    if cu_seq.device.type == "cpu" and has_values(cu_seq):
        bounds = bare(cu_seq)
        first, last = int(bounds[..., 0].max()), int(bounds[..., -1].max())
        lengths = bounds.diff()
        shortest, most = (int(n) for n in lengths.aminmax()) if lengths.numel() else (0, 0)
        if bool(bounds[..., 0].any()) or shortest < 0 or last > tokens.shape[0]:
            raise ValueError(
                f"{name} must rise from 0 to at most {tokens.shape[0]}, the number of tokens, "
                f"got values from {first} to {last}{'' if shortest >= 0 else ' that fall in between'}"
            )
        if most > longest:
            raise ValueError(
                f"{longest_name} must be at least the longest sequence of {name}, {most}, got {longest}"
            )
    return longest


def used(seqused_k: object, cu_seq_k: Tensor, key: Tensor) -> None:
    """seqused_k [S]: how many keys of each sequence exist."""
    _whole_numbers("seqused_k", seqused_k, "[S]", key)
    assert isinstance(seqused_k, Tensor)
    if seqused_k.shape[0] != cu_seq_k.shape[0] - 1:
        raise ValueError(
            f"seqused_k must have one entry per sequence, {cu_seq_k.shape[0] - 1}, got {describe(seqused_k)}"
        )
    if seqused_k.device.type == "cpu" and has_values(seqused_k) and seqused_k.numel():
        room = cu_seq_k.diff()
        if bool((seqused_k < 0).any()) or bool((seqused_k > room).any()):
            at = int(((seqused_k < 0) | (seqused_k > room)).int().argmax())
            raise ValueError(
                f"seqused_k must lie between 0 and each sequence's keys, "
                f"got {int(seqused_k[at])} for sequence {at} of {int(room[at])} keys"
            )


def same_sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            "cu_seq_q and cu_seq_k must have one entry more than there are sequences, "
            f"got {cu_seq_q.shape[0]} and {cu_seq_k.shape[0]} entries"
        )


def packed_value(value: object, key: Tensor) -> None:
    """value [Tk, Hkv, Dv] beside key [Tk, Hkv, D]."""
    packed_tensor("value", value, "[Tk, Hkv, Dv]")
    assert isinstance(value, Tensor)
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            "value must be [Tk, Hkv, Dv] with the key's tokens and heads, "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )


def one_cu_seq(cu_seq_q: Tensor, cu_seq_k: Tensor | None) -> None:
    """That the queries of each sequence are its keys. Values are read on the CPU alone."""
    if cu_seq_k is None or cu_seq_k is cu_seq_q:
        return
    if cu_seq_q.device.type != "cpu" or not has_values(cu_seq_q):
        raise ValueError("blocks of causal sequences need cu_seq_k=None: the queries of each are its keys")
    if not bool(bare(cu_seq_q == cu_seq_k).all()):
        raise ValueError(
            "blocks of causal sequences need cu_seq_k to be cu_seq_q: the queries of each are its keys"
        )


def packed_blocks(blocks: object, query: Tensor, key: Tensor, tiles: int) -> None:
    """blocks int [N, G, M] beside query [T, Hq, D] and key [Tk, Hkv, D]."""
    if not isinstance(blocks, Tensor) or blocks.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"blocks must be an int32 (or int64) tensor [N, G, M], got {describe(blocks)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if blocks.dim() != 3 or blocks.shape[0] != tiles or blocks.shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            "blocks must have shape [N, G, M] with a row for each tile, as varlen_block_select gives them, and G one "
            f"of 1, Hkv, Hq; here Hkv={kv_heads}, Hq={heads}, got {describe(blocks)}"
        )


def packed_weights(weights: object, query: Tensor) -> None:
    """weights [T, G·Hi] beside an indexer's query [T, G·Hi, D]; the op checks the rest of it."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape [T, G·Hi], got {describe(weights)}")
    if weights.shape != query.shape[:2]:
        raise ValueError(
            f"weights must have the query's first two dimensions [T, G·Hi] = {list(query.shape[:2])}, "
            f"got {describe(weights)}"
        )


def packed_indices(indices: object, query: Tensor, key: Tensor) -> None:
    """indices int [T, G, K] beside query [T, Hq, D] and key [Tk, Hkv, D]."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be an int32 (or int64) tensor [T, G, K], got {describe(indices)}")
    if indices.dim() != 3 or indices.shape[0] != query.shape[0]:
        raise ValueError(
            f"indices must have shape [T, G, K] with T = {query.shape[0]}, got {describe(indices)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if indices.shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            "indices must have shape [T, G, K] with G one of 1, Hkv, Hq; "
            f"here Hkv={kv_heads}, Hq={heads}, got {describe(indices)}"
        )


def _whole_numbers(name: str, numbers: object, shape: str, beside: Tensor) -> None:
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor {shape}, got {describe(numbers)}")
    if numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(numbers)}")
    if numbers.dim() != 1:
        raise ValueError(f"{name} must have shape {shape}, got {describe(numbers)}")
    if numbers.device != beside.device:
        raise ValueError(f"{name} must be on the tensors' device {beside.device}, got {numbers.device}")
