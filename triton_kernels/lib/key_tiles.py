"""Tiles of queries and of keys as the kernels that select load them: keys along the rows of the score tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_queries(query_rows, query_d, depth, inside_depth, SIGN: tl.constexpr):
    """[D, BM] of the queries that [BM] pointers name, times the sign of the scale."""
    queries = tl.load(
        query_rows[None, :] + depth.to(tl.int64)[:, None] * query_d, mask=inside_depth[:, None], other=0.0
    )
    if SIGN != 1:
        queries = (queries.to(tl.float32) * SIGN).to(queries.dtype)
    return queries


@triton.jit
def load_keys(
    key_head,  # pointer to the keys of a head
    place,  # int64 [BN]: where they lie from there on
    exists,  # bool [BN], or None: all of them
    key_d,
    depth,
    inside_depth,
):
    """[BN, D], 0 where there is no key and past the last dimension."""
    wanted = inside_depth[None, :]
    if exists is not None:
        wanted = exists[:, None] & inside_depth[None, :]
    return tl.load(
        key_head + place[:, None] + depth.to(tl.int64)[None, :] * key_d,
        mask=wanted,
        other=0.0,
    )
