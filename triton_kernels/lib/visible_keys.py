"""Which keys a query sees and always keeps, from numbers that each query may have of its own."""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**40)  # beyond any sequence, and sums of it fit


@triton.jit
def first_keys(starts, batch, position, starts_b, starts_t, length):
    """Where the keys of each query begin, int32 in [0, length]: starts int [B, Tq], position int32 [Q]."""
    first = tl.load(starts + batch * starts_b + position.to(tl.int64) * starts_t)
    return tl.minimum(tl.maximum(first, 0), length).to(tl.int32)


@triton.jit
def _offsets_of(offsets, batch, position, offsets_b, offsets_t):
    own = tl.load(offsets + batch * offsets_b + position.to(tl.int64) * offsets_t).to(tl.int64)
    return tl.minimum(tl.maximum(own, -FAR), FAR)


@triton.jit
def last_keys(
    offsets,  # int [B, Tq] or None
    batch,
    position,  # int32 [Q]
    offsets_b,
    offsets_t,
    causal_offset,  # of all queries, where there are no offsets
    length,
):
    """Where the keys of each query end, int32 in [0, length]."""
    if offsets is not None:
        causal_offset = _offsets_of(offsets, batch, position, offsets_b, offsets_t)
    return tl.minimum(tl.maximum(position + causal_offset + 1, 0), length).to(tl.int32)


@triton.jit
def window_starts(
    offsets,  # int [B, Tq] or None
    batch,
    position,  # int32 [Q]
    offsets_b,
    offsets_t,
    window_offset,  # causal offset less the window; where there are offsets, less the window alone
    length,
):
    """From where on each query always keeps the keys that it sees, int32 [Q]."""
    start = position + window_offset + 1
    if offsets is not None:
        far = start + _offsets_of(offsets, batch, position, offsets_b, offsets_t)
        start = tl.minimum(tl.maximum(far, 0), length).to(tl.int32)
    return start
