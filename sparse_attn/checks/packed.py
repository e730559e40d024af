"""Checks of packed sequences: tensors without a batch dimension, or pages, and where each sequence lies in them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks.attention import query_key, value_of
from sparse_attn.checks.values import bare, boolean, describe, few_numbers, has_values, integer


def packed_tensor(name: str, value: object, axes: str) -> None:
    """A tensor of three dimensions; the ops check the rest of it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {describe(value)}")
    if value.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions {axes}, got {describe(value)}")


def offsets(
    name: str,
    cu_seq: object,
    tokens: Tensor,
    longest_name: str,
    longest: Any,
    *,
    paged: bool = False,
    numbers: list[int] | None = None,
) -> tuple[int, list[int] | None]:
    """cu_seq [S + 1] of sequences that lie end to end in `tokens` [T, …]; returns `longest`, which none passes, and its
    values, where :func:`few_numbers` gives them (`numbers`: they are known already).

    `paged`: the tokens lie elsewhere, and only the sequences' lengths are meant.

    Values are read on the CPU alone; elsewhere what they say beyond the tokens is never followed.
    """
    _whole_numbers(name, cu_seq, "[S + 1]", tokens)
    assert isinstance(cu_seq, Tensor)
    if cu_seq.shape[0] < 1:
        raise ValueError(f"{name} must have at least one entry, the 0 where sequences begin, got none")
    longest = integer(longest_name, longest, 0)
    if numbers is None:
        numbers = few_numbers(cu_seq)
    if numbers is not None or (cu_seq.device.type == "cpu" and has_values(cu_seq)):
        if numbers is not None:
            first, last = numbers[0], numbers[-1]
            gaps = [b - a for a, b in itertools.pairwise(numbers)]
            from_zero, shortest, most = first == 0, min(gaps, default=0), max(gaps, default=0)
        else:
            bounds = bare(cu_seq)
            first, last = int(bounds[..., 0].max()), int(bounds[..., -1].max())
            lengths = bounds.diff()
            shortest, most = (int(n) for n in lengths.aminmax()) if lengths.numel() else (0, 0)
            from_zero = not bool(bounds[..., 0].any())
        if not from_zero or shortest < 0 or (last > tokens.shape[0] and not paged):
            most_tokens = "" if paged else f" to at most {tokens.shape[0]}, the number of tokens"
            raise ValueError(
                f"{name} must rise from 0{most_tokens}, "
                f"got values from {first} to {last}{'' if shortest >= 0 else ' that fall in between'}"
            )
        if most > longest:
            raise ValueError(
                f"{longest_name} must be at least the longest sequence of {name}, {most}, got {longest}"
            )
    return longest, numbers


def documents(cu_seq: object, tokens: int) -> Tensor:
    """cu_seq [S + 1] of documents among so many tokens that lie on several ranks, as int64."""
    if not isinstance(cu_seq, Tensor):
        raise TypeError(f"cu_seq must be an int32 or int64 tensor [S + 1], got {describe(cu_seq)}")
    if cu_seq.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seq must be int32 or int64, got {describe(cu_seq)}")
    if cu_seq.dim() != 1 or cu_seq.shape[0] < 1:
        raise ValueError(
            f"cu_seq must have shape [S + 1], with the 0 where documents begin, got {describe(cu_seq)}"
        )
    if cu_seq.device.type == "cpu" and has_values(cu_seq):
        numbers = cu_seq.tolist()
        if numbers[0] != 0 or numbers != sorted(numbers) or numbers[-1] > tokens:
            few = numbers if len(numbers) <= 8 else [*numbers[:4], "…", *numbers[-3:]]
            raise ValueError(
                f"cu_seq must rise from 0 to at most {tokens}, the layout's positions, got {few}"
            )
    return cu_seq.to(torch.int64)


def used(seqused_k: object, cu_seq_k: Tensor, key: Tensor, bounds: list[int] | None) -> list[int] | None:
    """seqused_k [S]: how many keys of each sequence exist. `bounds` are the values of cu_seq_k, returned its own, where
    :func:`few_numbers` gives them."""
    _whole_numbers("seqused_k", seqused_k, "[S]", key)
    assert isinstance(seqused_k, Tensor)
    if seqused_k.shape[0] != cu_seq_k.shape[0] - 1:
        raise ValueError(
            f"seqused_k must have one entry per sequence, {cu_seq_k.shape[0] - 1}, got {describe(seqused_k)}"
        )
    numbers = None if bounds is None else few_numbers(seqused_k)
    if numbers is not None and all(
        0 <= n <= b - a for n, (a, b) in zip(numbers, itertools.pairwise(bounds or ()), strict=True)
    ):
        return numbers
    if seqused_k.device.type == "cpu" and has_values(seqused_k) and seqused_k.numel():
        room = cu_seq_k.diff()
        if bool((seqused_k < 0).any()) or bool((seqused_k > room).any()):
            at = int(((seqused_k < 0) | (seqused_k > room)).int().argmax())
            raise ValueError(
                f"seqused_k must lie between 0 and each sequence's keys, "
                f"got {int(seqused_k[at])} for sequence {at} of {int(room[at])} keys"
            )
    return None


def same_sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> None:
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            "cu_seq_q and cu_seq_k must have one entry more than there are sequences, "
            f"got {cu_seq_q.shape[0]} and {cu_seq_k.shape[0]} entries"
        )


def pages(name: str, value: object, axes: str) -> None:
    """A cache [P, page size, Hkv, D]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes} with block_table, got {describe(value)}")
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions {axes} with block_table, got {describe(value)}")
    size = value.shape[1]
    if size != 1 and (size % 16 or size == 0):
        raise ValueError(f"{name} must have pages of 1 key or of a multiple of 16, got pages of {size}")
    if value.shape[0] * size >= 2**31:
        raise ValueError(f"{name} must have fewer than 2^31 keys in its pages, got {describe(value)}")


def paged_tensors(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """query [1, Hq, T, D] beside pages [P, Hkv, page size, D] and [P, Hkv, page size, Dv]."""
    # A batch entry of one page in the place of the pages, of which there may be none.
    page = key[:1] if key.shape[0] else key.new_empty((1, *key.shape[1:]))
    query_key(query, page)
    if value is not None:
        value_of(page, value[:1] if value.shape[0] else value.new_empty((1, *value.shape[1:])))


def paged_value(value: object, key: Tensor) -> None:
    """value [P, page size, Hkv, Dv] beside key [P, page size, Hkv, D]."""
    pages("value", value, "[P, page size, Hkv, Dv]")
    assert isinstance(value, Tensor)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "value must be [P, page size, Hkv, Dv] with the key's pages and heads, "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )


def no_gradient(*tensors: object) -> None:
    """Keys and values in pages are read in place, and nothing is differentiated."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "a call with block_table has no gradient: call it under torch.no_grad(), or give key and value end to end"
        )


def index_of_pages(key_index: object, block_table: object) -> None:
    """key_index, which packed keys have only in pages."""
    if key_index is not None and block_table is None:
        raise ValueError(
            "key_index needs block_table in a packed call: it is a sparse_attn.PagedKeyIndex of the keys' pages"
        )


def slots(name: str, numbers: object, total: int, device: torch.device) -> Tensor:
    """Places in pages, int64 [T]; values are read on the CPU alone."""
    if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int64 (or int32) tensor [T], got {describe(numbers)}")
    if numbers.dim() != 1 or numbers.device != device:
        raise ValueError(
            f"{name} must have shape [T] and be on {device}, got {describe(numbers)} on {numbers.device}"
        )
    if device.type == "cpu" and has_values(numbers) and numbers.numel():
        low, high = (int(n) for n in numbers.aminmax())
        if low < 0 or high >= total:
            raise IndexError(f"{name} must be 0 … {total - 1}, got {low if low < 0 else high}")
    return numbers.to(torch.int64).contiguous()


def kind_of_indices(physical_indices: object, block_table: object) -> bool:
    """physical_indices, which only pages have."""
    physical_indices = boolean("physical_indices", physical_indices)
    if physical_indices and block_table is None:
        raise ValueError("physical_indices needs block_table: without pages there is one kind of indices")
    return physical_indices


def block_table_of(block_table: object, key: Tensor, count: int) -> Tensor:
    """block_table as int32 [S, pages], contiguous; what no int32 holds is no page."""
    if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"block_table must be an int32 (or int64) tensor [S, pages], got {describe(block_table)}"
        )
    if block_table.dim() != 2 or block_table.shape[0] != count:
        raise ValueError(
            f"block_table must have shape [S, pages] with S = {count} sequences, got {describe(block_table)}"
        )
    if block_table.device != key.device:
        raise ValueError(f"block_table must be on the key's device {key.device}, got {block_table.device}")
    if block_table.numel() * key.shape[1] >= 2**31 - 64:
        raise ValueError(
            f"block_table must name fewer than 2^31 keys, got {describe(block_table)} of pages of {key.shape[1]}"
        )
    if block_table.dtype == torch.int64:
        fits = (block_table >= 0) & (block_table < key.shape[0])
        block_table = torch.where(fits, block_table, -1).to(torch.int32)
    return block_table.contiguous()


def used_of_pages(
    seqused_k: object,  # int [S], or None
    cu_seq_k: Tensor | None,  # int [S + 1]
    block_table: Tensor,  # int32 [S, pages]
    given: Tensor,  # the same as it came
    key: Tensor,  # [P, page size, Hkv, D]
    longest: int,
) -> tuple[Tensor, list[int] | None]:
    """How many keys of each sequence exist, int [S]; of those the pages have to be there. And its values, where
    :func:`few_numbers` gives them."""
    if seqused_k is None and cu_seq_k is None:
        raise ValueError("block_table needs seqused_k [S], how many keys of each sequence exist, got None")
    size = key.shape[1]
    room = block_table.shape[1] * size
    lengths = None if cu_seq_k is None else cu_seq_k.diff()
    name = "cu_seq_k" if seqused_k is None else "seqused_k"
    if seqused_k is None:
        assert lengths is not None
        found = lengths
    else:
        _whole_numbers("seqused_k", seqused_k, "[S]", key)
        assert isinstance(seqused_k, Tensor)
        found = seqused_k
        if found.shape[0] != block_table.shape[0]:
            raise ValueError(
                f"seqused_k must have one entry per sequence, {block_table.shape[0]}, got {describe(found)}"
            )
    numbers = few_numbers(found)
    limits = [room] * len(numbers or ()) if lengths is None else few_numbers(lengths)
    readable = has_values(block_table) and block_table.numel() > 0 and key.shape[0] > 0
    if numbers is not None and limits is not None and readable:
        within = (0 <= n <= min(limit, room, longest) for n, limit in zip(numbers, limits, strict=True))
        if all(within) and _pages_are_there(block_table, numbers, size, key.shape[0]):
            return found, numbers
    if found.device.type == "cpu" and has_values(found) and has_values(block_table) and found.numel():
        most = torch.full_like(found, room) if lengths is None else lengths.clamp(max=room)
        wrong = (found < 0) | (found > most)
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ValueError(
                f"{name} must give each sequence between 0 keys and those of its pages in block_table"
                f"{'' if lengths is None or seqused_k is None else ' and of cu_seq_k'}, "
                f"got {int(found[at])} for sequence {at} of {int(most[at])} keys"
            )
        if int(found.max()) > longest:
            raise ValueError(
                f"max_k must be at least the longest sequence, {int(found.max())}, got {longest}"
            )
        needed = torch.arange(block_table.shape[1]) * size < found.unsqueeze(1)
        absent = needed & ((block_table < 0) | (block_table >= key.shape[0]))
        if bool(absent.any()):
            at, page = (int(n) for n in absent.nonzero()[0])
            raise IndexError(
                f"block_table must name pages 0 … {key.shape[0] - 1} where a sequence has keys, "
                f"got {int(given[at, page])} for page {page} of sequence {at}"
            )
    return found, numbers


def _pages_are_there(block_table: Tensor, used: list[int], size: int, count: int) -> bool:
    """Whether the first pages of each sequence, as many as its keys need, are among 0 … count − 1. False where that
    takes longer to say than the search for one that is not."""
    if block_table.numel() > 1024:
        low, high = (int(n) for n in block_table.aminmax())
        return low >= 0 and high < count
    rows = zip(block_table.tolist(), used, strict=True)
    needed = [row[: -(-n // size)] for row, n in rows if n > 0]
    return all(min(row) >= 0 and max(row) < count for row in needed)


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
    if blocks.device != query.device:
        raise ValueError(f"blocks must be on the query's device {query.device}, got {blocks.device}")


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
    """indices int [T, G, K] beside query [T, Hq, D] and key [Tk, Hkv, D], or pages [P, page size, Hkv, D]."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be an int32 (or int64) tensor [T, G, K], got {describe(indices)}")
    if indices.dim() != 3 or indices.shape[0] != query.shape[0]:
        raise ValueError(
            f"indices must have shape [T, G, K] with T = {query.shape[0]}, got {describe(indices)}"
        )
    heads, kv_heads = query.shape[1], key.shape[-2]
    if indices.device != query.device:
        raise ValueError(f"indices must be on the query's device {query.device}, got {indices.device}")
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
