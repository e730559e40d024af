"""Every check of a user's arguments, and the wording of every error.

One sentence per error: which argument, what came, what is accepted. All checks read shapes, dtypes and plain
numbers; the few that must read tensor values are marked and run only where that costs no device synchronisation.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHARES = ("none", "kv", "all")
# Positions up to here can be added to each other and to a tensor's size within int64, in every wing.
_LARGEST = 2**62 - 1


def describe(value: object) -> str:
    """What came, in a few words: `a float32 tensor of shape [2, 3]`, or `'abc' (str)`."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor of shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def token_batch(what: str, tokens: Tensor, vocabulary: int | None = None) -> None:
    """That `tokens` is int [B, T] with at least one token and, where it is known, ids below `vocabulary`."""
    whole = isinstance(tokens, Tensor) and tokens.dtype in (torch.int32, torch.int64) and tokens.dim() == 2
    if not whole:
        raise TypeError(f"{what} token ids, int64 [B, T], got {describe(tokens)}")
    if tokens.numel() == 0:
        raise ValueError(f"{what} at least one token, got shape {list(tokens.shape)}")
    if vocabulary is not None:
        low, high = (int(n) for n in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"{what} ids in 0 … {vocabulary - 1}, the model's vocabulary, got {low if low < 0 else high}"
            )


def integer(name: str, value: object, minimum: int = -_LARGEST, maximum: int = _LARGEST) -> int:
    """An int (or a symbolic one), not a bool; numpy integers are taken too."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
        value = value.__index__()
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return value


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def _dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


def _has_values(tensor: Tensor) -> bool:
    """Whether its elements can be read: a compiler, a fake tensor and the meta device have none."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta" and not is_fake(tensor)


def _attention_tensor(name: str, value: object, axes: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {describe(value)}")
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions {axes}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {describe(value)}")
    _dense(name, value)
    if value.shape[3] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, got {describe(value)}")


def query_key(query: Tensor, key: Tensor) -> None:
    """query [B, Hq, Tq, D] and key [B, Hkv, Tk, D]."""
    _attention_tensor("query", query, "[B, Hq, Tq, D]")
    _attention_tensor("key", key, "[B, Hkv, Tk, D]")
    if key.dtype != query.dtype:
        raise TypeError(f"query and key must have one dtype, got query {query.dtype} and key {key.dtype}")
    if key.device != query.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    if key.shape[0] != query.shape[0]:
        raise ValueError(
            f"query and key must have one batch size, got query {list(query.shape)} and key {list(key.shape)}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            "query and key must have one head dimension D (the last), "
            f"got query {list(query.shape)} and key {list(key.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads != 0 or heads == 0:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the number of key heads, "
            f"got {heads} query heads and {kv_heads} key heads"
        )


def indexer_weights(weights: object, query: Tensor) -> Tensor:
    """weights [B, G·Hi, Tq] beside the indexer's query [B, G·Hi, Tq, D], as float32 (float64 for float64)."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor of shape [B, G·Hi, Tq], got {describe(weights)}")
    if weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weights must be float32, float16, bfloat16 or float64, got {describe(weights)}")
    _dense("weights", weights)
    if weights.shape != query.shape[:3]:
        raise ValueError(
            "weights must have the shape of query's first three dimensions, "
            f"[B, G·Hi, Tq] = {list(query.shape[:3])}, got {describe(weights)}"
        )
    if weights.device != query.device:
        raise ValueError(f"weights must be on the query's device {query.device}, got {weights.device}")
    return weights.to(torch.promote_types(query.dtype, torch.float32))


def value_of(key: Tensor, value: Tensor) -> None:
    """value [B, Hkv, Tk, Dv] beside key [B, Hkv, Tk, D]."""
    _attention_tensor("value", value, "[B, Hkv, Tk, Dv]")
    if value.dtype != key.dtype:
        raise TypeError(f"key and value must have one dtype, got key {key.dtype} and value {value.dtype}")
    if value.device != key.device:
        raise ValueError(f"key and value must be on one device, got {key.device} and {value.device}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, heads and length (the first three dimensions), "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )


def softmax_scale(scale: object, head_dim: int) -> float:
    """The factor of q·k; None is the standard 1/√D."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a float or None, got {describe(scale)}")
    try:
        scale = float(scale)
    except OverflowError:
        raise ValueError("scale must be finite, got an int beyond the range of floats") from None
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def causal_offset_of(is_causal: bool, causal_offset: object, query_length: int, key_length: int) -> int:
    """The offset of the causal diagonal: query i sees keys 0 … i + offset."""
    if not is_causal:
        if causal_offset is not None:
            raise ValueError(
                f"causal_offset needs is_causal=True, got causal_offset={causal_offset!r} without it"
            )
        return 0
    if causal_offset is not None:
        return integer("causal_offset", causal_offset)
    if query_length != key_length:
        raise ValueError(
            f"is_causal with {query_length} queries and {key_length} keys needs causal_offset (query i sees keys "
            f"0 … i + causal_offset): {key_length - query_length} if the queries are the last ones, 0 if the first"
        )
    return 0


def mask_of(
    attn_mask: object, query: Tensor, key: Tensor, groups: int, *, per_group: bool = False
) -> Tensor | None:
    """The mask as bool [B, G, Tq, Tk], a view wherever possible; None stays None.

    `per_group`: it is given per group, not per query head.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a boolean tensor or None, got {describe(attn_mask)}")
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean (True = may attend), got {describe(attn_mask)}; "
            "an additive mask of 0 and -inf is `attn_mask == 0`"
        )
    _dense("attn_mask", attn_mask)
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, got {attn_mask.device}")
    batch, heads, query_length = query.shape[:3]
    heads, axes = (groups, "[B, G, Tq, Tk]") if per_group else (heads, "[B, Hq, Tq, Tk]")
    shape = (batch, heads, query_length, key.shape[2])
    given = attn_mask.shape
    if len(given) > 4 or any(n not in (1, want) for n, want in zip(given[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {axes} = {list(shape)}, got {describe(attn_mask)}")
    while attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    if attn_mask.shape[1] == 1 or groups == heads:
        return attn_mask.expand(batch, groups, query_length, shape[3])
    # A mask per head where heads share one selection: it must be the same for all that share.
    heads_of = attn_mask.unflatten(1, (groups, heads // groups))
    first = heads_of[:, :, :1]
    if (
        heads_of.stride(2) != 0
        and _has_values(heads_of)
        and not torch.equal(heads_of, first.expand_as(heads_of))
    ):
        raise ValueError(
            "attn_mask must not differ among query heads that share one selection "
            f"({heads // groups} heads share here), got different masks"
        )
    return first[:, :, 0].expand(batch, groups, query_length, shape[3])


def lengths_of(key_lengths: object, key: Tensor) -> Tensor | None:
    """key_lengths as int32/int64 [B] on the key's device."""
    if key_lengths is None:
        return None
    batch, length = key.shape[0], key.shape[2]
    if not isinstance(key_lengths, Tensor):
        raise TypeError(
            f"key_lengths must be an int32 or int64 tensor of shape [B], got {describe(key_lengths)}"
        )
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, got {describe(key_lengths)}")
    if key_lengths.shape != (batch,):
        raise ValueError(f"key_lengths must have shape [B] = [{batch}], got {describe(key_lengths)}")
    _dense("key_lengths", key_lengths)
    if key_lengths.device != key.device:
        raise ValueError(f"key_lengths must be on the key's device {key.device}, got {key_lengths.device}")
    # Reads values: free on the CPU; elsewhere every wing clamps to [0, Tk] instead of synchronising.
    if key.device.type == "cpu" and batch and _has_values(key_lengths):
        low, high = (int(x) for x in key_lengths.aminmax())
        if low < 0 or high > length:
            raise ValueError(
                f"key_lengths must lie in [0, Tk] = [0, {length}], got values from {low} to {high}"
            )
    return key_lengths


def budget(top_k: object, window: object, sinks: object, is_causal: bool) -> tuple[int, int, int]:
    """(top_k, window, sinks), where top_k is the whole budget of keys per query."""
    top_k = integer("top_k", top_k, 1, 2**63 - 1)
    window = integer("window", window, 0)
    sinks = integer("sinks", sinks, 0)
    if window > 0 and not is_causal:
        raise ValueError(f"window needs is_causal=True, got window={window} without it")
    if window + sinks > top_k:
        raise ValueError(
            f"top_k is the whole budget and must be at least window + sinks, "
            f"got top_k={top_k}, window={window}, sinks={sinks}"
        )
    return top_k, window, sinks


def blocks_of(blocks: object, query: Tensor, key: Tensor, query_tile: int) -> Tensor:
    """blocks as int32 [B, G, N, M], N = ⌈Tq / query_tile⌉."""
    batch, heads, query_length = query.shape[:3]
    kv_heads, tiles = key.shape[1], -(-query_length // query_tile)
    if not isinstance(blocks, Tensor):
        raise TypeError(f"blocks must be an int32 tensor of shape [B, G, N, M], got {describe(blocks)}")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"blocks must be int32 (or int64), got {describe(blocks)}")
    _dense("blocks", blocks)
    if blocks.device != query.device:
        raise ValueError(f"blocks must be on the query's device {query.device}, got {blocks.device}")
    if (
        blocks.dim() != 4
        or blocks.shape[0] != batch
        or blocks.shape[1] not in (1, kv_heads, heads)
        or blocks.shape[2] != tiles
    ):
        raise ValueError(
            "blocks must have shape [B, G, N, M] with G one of 1, Hkv, Hq and N = ⌈Tq / query_tile⌉; "
            f"here B={batch}, Hkv={kv_heads}, Hq={heads}, N={tiles}, got {describe(blocks)}"
        )
    if blocks.dtype == torch.int64:
        # A number past 2^31 must not wrap around into range.
        blocks = torch.where((blocks >= 0) & (blocks <= key.shape[2]), blocks, -1).to(torch.int32)
    return blocks


def groups_of(share: object, heads: int, kv_heads: int) -> int:
    """G, the number of selections per batch entry."""
    if share == "none":
        return heads
    if share == "kv":
        return kv_heads
    if share == "all":
        return 1
    raise ValueError(f"share must be one of {', '.join(map(repr, SHARES))}, got {describe(share)}")


def indices_of(indices: object, query: Tensor, key: Tensor) -> Tensor:
    """indices as int32 [B, G, Tq, K]."""
    batch, heads, query_length = query.shape[:3]
    kv_heads, key_length = key.shape[1], key.shape[2]
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be an int32 tensor of shape [B, G, Tq, K], got {describe(indices)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 (or int64), got {describe(indices)}")
    _dense("indices", indices)
    if indices.device != query.device:
        raise ValueError(f"indices must be on the query's device {query.device}, got {indices.device}")
    if indices.dim() == 3:
        indices = indices.unsqueeze(1)
    if (
        indices.dim() != 4
        or indices.shape[0] != batch
        or indices.shape[1] not in (1, kv_heads, heads)
        or indices.shape[2] != query_length
    ):
        raise ValueError(
            "indices must have shape [B, G, Tq, K] with G one of 1, Hkv, Hq, or [B, Tq, K]; "
            f"here B={batch}, Hkv={kv_heads}, Hq={heads}, Tq={query_length}, got {describe(indices)}"
        )
    if indices.dtype == torch.int64:
        # An index past 2^31 must not wrap around into range.
        indices = torch.where((indices >= 0) & (indices < key_length), indices, -1).to(torch.int32)
    return indices
