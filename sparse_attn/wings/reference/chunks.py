"""Chunks of queries, so that no intermediate of the reference wing grows with Tq·Tk."""

from __future__ import annotations

from collections.abc import Iterator

# Elements of the largest intermediate of one chunk: 64 MiB in float32.
_ELEMENTS = 1 << 24


def query_chunks(query_length: int, elements_per_query: int) -> Iterator[slice]:
    """Slices over 0 … query_length, each of a bounded number of intermediate elements."""
    step = max(1, _ELEMENTS // max(1, elements_per_query))
    for start in range(0, query_length, step):
        yield slice(start, min(start + step, query_length))
