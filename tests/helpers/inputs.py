"""Inputs: integers whose scores are exact, normal numbers, layouts, index rows and selection options."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

INT32 = torch.iinfo(torch.int32)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, largest: int = 3) -> Tensor:
    """Small integers: every product and every sum of them is exact in every dtype, so ties are real ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, heads, kv_heads, queries, keys, dim, value_dim=None, dtype=torch.float32, seed=0, make=normal):
    """(query [B, Hq, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv])."""
    return (
        make(batch, heads, queries, dim, dtype=dtype, seed=3 * seed),
        make(batch, kv_heads, keys, dim, dtype=dtype, seed=3 * seed + 1),
        make(batch, kv_heads, keys, value_dim or dim, dtype=dtype, seed=3 * seed + 2),
    )


def mask(*shape: int, seed: int = 0, density: float = 0.6) -> Tensor:
    """A random boolean mask; some rows see nothing."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(shape, generator=generator) < density
    dead = torch.rand((*shape[:-1], 1), generator=generator) < 0.1
    return visible & ~dead


def with_scores(scores: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(query [1, 1, 1, dim], key [1, 1, Tk, dim]) with q·k = scores [Tk], exact in every dtype.

    The scores are integers below 2^14, split in two digits: bfloat16 holds the integers up to 256 only.
    """
    digits = torch.stack((scores.div(64, rounding_mode="floor"), scores % 64), dim=-1)
    key = torch.zeros(1, 1, len(scores), dim)
    key[..., :2] = digits
    query = torch.zeros(1, 1, 1, dim)
    query[..., 0], query[..., 1] = 64, 1
    return query.to(dtype), key.to(dtype)


def index_rows(shape: tuple[int, ...], length: int, seed: int = 0, *, garbage: bool = False) -> Tensor:
    """int32 rows, ascending, unique, padded with −1; or with garbage: unsorted, repeated, out of range."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    if garbage:
        junk = torch.tensor([-1, -2, -length, length, length + 1, INT32.min, INT32.max], dtype=torch.int64)
        valid = torch.randint(0, max(1, length), shape, generator=generator)
        pick = junk[torch.randint(0, len(junk), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < 0.6, valid, pick).to(torch.int32)
    order = torch.rand((*shape[:-1], length), generator=generator).argsort(-1)[..., :width]
    rows = torch.full(shape, length)
    rows[..., : order.shape[-1]] = order
    keep = torch.randint(0, width + 1, (*shape[:-1], 1), generator=generator)  # some rows are empty
    rows = rows.where(torch.arange(width) < keep, length).sort(-1).values
    return rows.where(rows < length, -1).to(torch.int32)


def _storage(tensor: Tensor, *shape: int) -> Tensor:
    """A larger tensor, NaN where the view of it that a layout takes does not lie."""
    fill = math.nan if tensor.is_floating_point() else INT32.max
    return torch.full(shape, fill, dtype=tensor.dtype)


def _time_before_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _last_before_time(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def _batch_last(tensor: Tensor) -> Tensor:
    return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def _every_second(tensor: Tensor) -> Tensor:
    batch, heads, length, dim = tensor.shape
    view = _storage(tensor, batch, heads, length, 2 * dim)[..., ::2]
    return view.copy_(tensor)


def _inside(tensor: Tensor) -> Tensor:
    batch, heads, length, dim = tensor.shape
    view = _storage(tensor, batch + 1, heads + 2, length + 3, dim + 5)[1:, 1:-1, 2:-1, 3:-2]
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "time_before_heads": _time_before_heads,
    "last_before_time": _last_before_time,
    "batch_last": _batch_last,
    "every_second": _every_second,
    "inside": _inside,
}

# Selection options for queries and keys of one length; a mask is made by `options_for`.
OPTIONS: dict[str, dict] = {
    "plain": {},
    "causal": {"is_causal": True},
    "offset": {"is_causal": True, "causal_offset": 3},
    "negative_offset": {"is_causal": True, "causal_offset": -4},
    "window": {"is_causal": True, "window": 3},
    "window_sinks": {"is_causal": True, "window": 2, "sinks": 2},
    "sinks": {"sinks": 3},
    "whole_budget": {"is_causal": True, "window": 4, "sinks": 1},
    "window_beyond_keys": {"is_causal": True, "causal_offset": 9, "window": 5},
    "negative_scale": {"scale": -0.7},
    "zero_scale": {"scale": 0.0, "is_causal": True},
    "mask": {"attn_mask": "[B, 1, Tq, Tk]"},
    "mask_keys": {"attn_mask": "[B, 1, 1, Tk]"},
    "mask_2d": {"attn_mask": "[Tq, Tk]", "is_causal": True, "window": 2, "sinks": 1},
    "starts": {"key_starts": "[B]", "sinks": 1},
    "starts_of_queries": {"key_starts": "[B, Tq]", "is_causal": True, "window": 2, "sinks": 2},
    "lengths": {"key_lengths": torch.int32},
    "lengths_causal": {"key_lengths": torch.int64, "is_causal": True, "window": 3, "sinks": 1},
    "everything": {
        "is_causal": True,
        "causal_offset": -2,
        "attn_mask": "[B, 1, Tq, Tk]",
        "key_lengths": torch.int32,
        "key_starts": "[B, Tq]",
        "window": 2,
        "sinks": 2,
        "scale": 0.3,
    },
}


def options_for(name: str, query: Tensor, key: Tensor, seed: int = 0) -> dict:
    """The options of that name, with their mask and lengths made for these tensors."""
    options = dict(OPTIONS[name])
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if "attn_mask" in options:
        sizes = {"B": batch, "1": 1, "Tq": queries, "Tk": keys}
        shape = [sizes[n] for n in options["attn_mask"].strip("[]").split(", ")]
        options["attn_mask"] = mask(*shape, seed=seed)
    if "key_lengths" in options:
        lengths = torch.arange(batch) * (keys // 2) % (keys + 1)
        options["key_lengths"] = (keys - lengths).to(options["key_lengths"])
    if "key_starts" in options:
        of_batch = torch.arange(batch, dtype=torch.int32) * (keys // 3) % (keys + 1)
        # Packed sequences: three queries each, some of which see nothing.
        of_queries = of_batch.long().unsqueeze(1) + torch.arange(queries) // 3 * 3 * keys // max(1, queries)
        options["key_starts"] = of_batch if options["key_starts"] == "[B]" else of_queries
    if options.get("is_causal") and queries != keys:
        options.setdefault("causal_offset", keys - queries)
    return options
