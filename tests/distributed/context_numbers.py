"""Context parallelism where scores are hard to tell apart: ties, near ties, special values, keys of all sizes."""

from __future__ import annotations

import torch

import sparse_attn as sa
from distributed.whole import DV, HKV, HQ, WAYS, B, T, compare, inputs, lattice, layouts
from distributed.world import check
from sparse_attn.distributed import Layout, context_parallel_attention


@check
def ties(rank, size):
    for way in WAYS:
        for layout in layouts(T, size).values():
            compare(rank, inputs(make=lattice), 7, layout, way=way, is_causal=True, tolerance=1e-4)
            compare(
                rank,
                inputs(make=lattice),
                9,
                layout,
                way=way,
                is_causal=True,
                sinks=2,
                window=3,
                tolerance=1e-4,
            )
            compare(rank, inputs(make=lambda *s: torch.ones(s)), 5, layout, way=way)


@check
def near_ties(rank, size):
    """Keys that differ in their last bits alone: the kernel's rounding decides, in the merge too."""
    query, key, value = inputs()
    key = key[:, :, :1] * (1 + torch.randn(B, HKV, T, 1) * 1e-7)
    for layout in layouts(T, size).values():
        for way in ("merge", "index"):
            compare(rank, [query, key, value], 7, layout, way=way)
            compare(rank, [query, key, value], 7, layout, way=way, is_causal=True, window=1)


@check
def special_values(rank, size):
    query, key, value = inputs()
    key[0, :, 5], key[1, 1, 20], query[1, 2, 30] = torch.nan, torch.inf, torch.nan
    layout = Layout.zigzag(T, size)
    for way in WAYS:
        for options in ({}, {"is_causal": True, "window": 2}):
            asked = {"return_indices": True, **options}
            out, indices = sa.topk_attention(query, key, value, 6, **asked)
            parts = [layout.local(t, rank, 2) for t in (query, key, value)]
            ours, found = context_parallel_attention(*parts, 6, layout=layout, way=way, **asked)
            assert torch.equal(found, layout.local(indices, rank, 2))
            torch.testing.assert_close(ours, layout.local(out, rank, 2), equal_nan=True)


@check
def hard_keys(rank, size):
    """Bounds must hold for keys far from 0, of all sizes, alike but for their last bits, tied, infinite."""
    torch.manual_seed(9)
    queries, keys = Layout.even(9, size), Layout.even(700, size)
    for dim in (8, 72):
        query, key = torch.randn(1, HQ, 9, dim), torch.randn(1, HKV, 700, dim)
        value, few = torch.randn(1, HKV, 700, DV), torch.arange(700) % 10
        infinite = torch.where((few == 3).view(1, 1, -1, 1), torch.inf, key)
        spread = key * 10 ** (torch.rand(1, HKV, 700, 1) * 12 - 6)
        for q, k in (
            (query, key), (query, key + 100 * torch.randn(1, HKV, 1, dim)), (query, spread), (query * 1e-8, key * 1e8),
            (query, key[:, :, few] * (1 + 1e-6 * torch.randn(1, HKV, 700, 1))), (query, infinite),
            (lattice(*query.shape), lattice(*key.shape)), (query * 1e-20, key),
        ):  # fmt: skip
            for options in ({}, {"is_causal": True, "causal_offset": 690, "window": 3, "sinks": 2}):
                for dtype in (torch.float32, torch.bfloat16):
                    tensors = [t.to(dtype) for t in (q, k, value)]
                    indices = sa.topk_select(*tensors[:2], 20, **options)
                    parts = [
                        lay.local(t, rank, 2) for lay, t in zip((queries, keys, keys), tensors, strict=True)
                    ]
                    _, found = context_parallel_attention(
                        *parts,
                        20,
                        layout=queries,
                        key_layout=keys,
                        way="index",
                        return_indices=True,
                        **options,
                    )
                    assert torch.equal(found, queries.local(indices, rank, 2))
