"""The inputs of the attention benchmarks; all contenders of one comparison get the same tensors.

random     independent normal numbers
ascending  every later key scores higher: the worst order for a selection with a running threshold
real       queries, keys and values of a language model, from the file that the environment variable
           SPARSE_ATTN_REAL_INPUTS names; nothing is fetched here. In a checkout
           `python -m benchmarks.experiments.extract_real_inputs` writes one
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.checks import describe
from sparse_attn.files import read_tensors, refusal

KINDS = ("random", "ascending", "real")
REAL_INPUTS = "SPARSE_ATTN_REAL_INPUTS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(
    kind: str,
    length: int,
    *,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    query_length: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, Hq, Tq, D], key and value [B, Hkv, T, D]; fewer queries than keys are the last ones."""
    kv_heads = kv_heads or heads
    query_length = query_length or length
    if kind == "real":
        query, key, value = _real(length, batch, heads, kv_heads, head_dim)
    elif kind in ("random", "ascending"):
        generator = torch.Generator().manual_seed(seed)
        rows = max(length, query_length)
        query = torch.randn((batch, heads, rows, head_dim), generator=generator)
        key, value = (torch.randn((batch, kv_heads, length, head_dim), generator=generator) for _ in range(2))
        if kind == "ascending":
            query = 1 + 0.1 * query
            key = 0.001 * key + (4 / length) * torch.arange(length).unsqueeze(-1)
    else:
        raise ValueError(f"inputs must be one of {', '.join(KINDS)}, got {kind!r}")
    query = query[:, :, query.shape[2] - query_length :]
    return tuple(t.to(DTYPES[dtype]).contiguous() for t in (query, key, value))


def why_not(
    kind: str, length: int, *, batch: int = 1, heads: int = 8, kv_heads: int | None = None, head_dim: int = 64
) -> str | None:
    """None if there are such inputs, else the reason in one clause."""
    if kind != "real":
        return None
    if not os.environ.get(REAL_INPUTS):
        return (
            f"{REAL_INPUTS} is not set (in a checkout `python -m benchmarks.experiments.extract_real_inputs` "
            "writes such a file)"
        )
    if not Path(os.environ[REAL_INPUTS]).exists():
        return f"{REAL_INPUTS} names a file that does not exist"
    have = _load(os.environ[REAL_INPUTS])["query"].shape  # [H, T, D]
    if (batch, heads, head_dim) != (1, *have[::2]) or (kv_heads or heads) != heads or length > have[1]:
        return f"the real inputs hold {have[0]} heads of {have[1]} positions and width {have[2]}"
    return None


def describe_real() -> dict | None:
    """Where the real inputs come from, for the record."""
    return _load(os.environ[REAL_INPUTS])["origin"] if why_not("real", 1) is None else None


@lru_cache(maxsize=1)
def _load(path: str) -> dict:
    what = "query, key and value of one shape [H, T, D]"
    found = read_tensors(path, what)
    tensors = [found.get(name) for name in ("query", "key", "value")] if isinstance(found, dict) else [None]
    shapes = {tuple(t.shape) if isinstance(t, Tensor) else None for t in tensors}
    if len(shapes) != 1 or None in shapes or len(next(iter(shapes))) != 3:
        raise refusal(path, what, f"got {describe(found)}")
    return {"origin": None, **found}


def _real(length: int, batch: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    reason = why_not("real", length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    if reason is not None:
        raise ValueError(f"no real inputs: {reason}")
    stored = _load(os.environ[REAL_INPUTS])
    query, key, value = (stored[name][None, :, :length].float() for name in ("query", "key", "value"))
    return query, key, value
