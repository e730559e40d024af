"""Context parallelism against one process: indices to the bit, outputs and gradients within rounding."""

from __future__ import annotations

import contextlib

import pytest
import torch

import sparse_attn as sa
from distributed.whole import DV, HKV, HQ, WAYS, B, D, T, compare, inputs, lattice, layouts
from distributed.world import check
from sparse_attn.distributed import (
    AcrossRanks,
    Layout,
    context_parallel,
    context_parallel_attention,
    context_parallel_gathered_attention,
    count_bytes,
)

RULES = {
    "plain": {},
    "causal": {"is_causal": True},
    "kept": {"is_causal": True, "window": 3, "sinks": 2},
    "lengths": {"key_lengths": torch.tensor([30, 0])},
    "causal lengths": {"key_lengths": torch.tensor([9, 44]), "is_causal": True, "sinks": 2, "window": 2},
    "scores": {"is_causal": True, "softcap": 2.0, "sink_logits": torch.tensor([0.5, -1.0, 0.0, 2.0])},
}


@check
def gathered_keys(rank, size):
    for layout in layouts(T, size).values():
        for options in RULES.values():
            compare(rank, inputs(), 7, layout, **options)
    compare(rank, inputs(), 7, Layout.zigzag(T, size), is_causal=True, share="kv", window=2)
    compare(rank, inputs(), 7, Layout.zigzag(T, size), is_causal=True, share="all", sinks=1)
    mask = torch.rand(B, 1, T, T) < 0.5
    compare(rank, inputs(), 7, Layout.zigzag(T, size), attn_mask=mask)
    compare(rank, inputs(), 100, Layout.zigzag(T, size), is_causal=True)


@check
def merged_choices(rank, size):
    for layout in layouts(T, size).values():
        for options in RULES.values():
            compare(rank, inputs(), 7, layout, way="merge", **options)
    compare(rank, inputs(), 100, Layout.zigzag(T, size), way="merge", is_causal=True)
    compare(rank, inputs(), 5, Layout.zigzag(T, size), way="merge", is_causal=True, window=3, sinks=2)


@check
def rounded_keys_on_the_wire(rank, size):
    """Candidates by the bounds of 8-bit rows."""
    for layout in layouts(T, size).values():
        for options in RULES.values():
            compare(rank, inputs(), 7, layout, way="index", **options)


@check
def scales_masks_and_offsets(rank, size):
    """A scale of either sign and none, masks, offsets, long windows, starts."""
    mask = torch.rand(B, HQ, T, T) < 0.5
    causal = {"is_causal": True, "window": 6, "sinks": 3}
    starts = torch.tensor([4, 50])
    for options in (
        {"scale": -0.3}, {"scale": 0.0}, {"attn_mask": mask}, {"attn_mask": mask[:, :1], **causal},
        {"key_starts": starts, **causal}, {"causal_offset": -7, **causal}, {"causal_offset": 9, **causal},
        {"causal_offset": 200, **causal}, {"causal_offset": -200, **causal},
        {"attn_mask": mask[:1, :1, :1], "key_starts": starts, "key_lengths": torch.tensor([30, 45]), **causal},
    ):  # fmt: skip
        for way in WAYS:
            compare(rank, inputs(), 10, Layout.zigzag(T, size), way=way, **options)
            compare(
                rank,
                inputs(make=lattice),
                100,
                layouts(T, size)["uneven"],
                way=way,
                tolerance=1e-4,
                **options,
            )
    with count_bytes() as traffic:
        parts = [Layout.even(64, size).local(t, rank, 2) for t in inputs(queries=64, keys=64)]
        visible = torch.ones(64 // size, 64, dtype=torch.bool)
        context_parallel_attention(*parts, 4, layout=Layout.even(64, size), way="merge", attn_mask=visible)
    assert traffic.sent["mask"] == (size - 1) * (64 // size) * (64 // size) // 8  # a bit for a pair


@check
def half_types(rank, size):
    layout = Layout.zigzag(T, size)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for way in WAYS:
            compare(rank, inputs(dtype=dtype), 7, layout, way=way, is_causal=True, tolerance=4e-2)
    for way in WAYS:
        with torch.autocast("cpu", torch.bfloat16):
            compare(rank, inputs(), 7, layout, way=way, is_causal=True, tolerance=4e-2)


@check
def few_queries(rank, size):
    """Decoding: the query on one rank, the keys on all."""
    tensors = inputs(queries=3, keys=64)
    queries = Layout.contiguous([0, 3, *[0] * (size - 2)])
    for way in WAYS:
        for keys in (Layout.even(64, size), Layout.zigzag(64, size)):
            options = {"key_layout": keys, "way": way, "is_causal": True, "causal_offset": 61}
            compare(rank, tensors, 9, queries, **options)
            compare(rank, tensors, 9, queries, window=2, sinks=4, **options)


@check
def chosen_rows(rank, size):
    """Only the rows that were chosen travel, each once; gradients go back to where they came from."""
    for groups in (1, HKV, HQ):
        for layout in layouts(T, size).values():
            query, key, value = inputs()
            indices = (
                torch.stack([torch.randperm(T)[:6] for _ in range(B * groups * T)])
                .view(B, groups, T, 6)
                .int()
            )
            indices = torch.where(torch.rand(indices.shape) < 0.2, -1, indices)
            indices[0, :, 3] = -1
            leaves = [t.clone().requires_grad_() for t in (query, key, value)]
            out, lse = sa.gathered_attention(*leaves, indices, return_lse=True, softcap=3.0)
            weights = torch.randn_like(out)
            (out * weights).sum().backward()
            for way in ("fetch", "gather"):
                parts = [layout.local(t, rank, 2).clone().requires_grad_() for t in (query, key, value)]
                ours, our_lse = context_parallel_gathered_attention(
                    *parts,
                    layout.local(indices, rank, 2),
                    layout=layout,
                    way=way,
                    return_lse=True,
                    softcap=3.0,
                )
                (ours * layout.local(weights, rank, 2)).sum().backward()
                torch.testing.assert_close(ours, layout.local(out, rank, 2))
                torch.testing.assert_close(our_lse, layout.local(lse, rank, 2))
                for part, leaf in zip(parts, leaves, strict=True):
                    torch.testing.assert_close(
                        part.grad, layout.local(leaf.grad, rank, 2), rtol=1e-4, atol=1e-5
                    )
    layout = Layout.even(64, size)
    query, key, value = (layout.local(t, rank, 2) for t in inputs(queries=64, keys=64))
    same = torch.arange(4).int().expand(B, 1, len(query[0, 0]), 4)  # the first rank's first four keys
    with count_bytes() as traffic:
        context_parallel_gathered_attention(query, key, value, same, layout=layout)
    assert traffic.sent["chosen rows"] == (4 * (size - 1) * B * HKV * (D + DV) * 4 if rank == 0 else 0)


@check
def what_is_refused(rank, size):
    layout = Layout.even(T, size)
    query, key, value = (layout.local(t, rank, 2) for t in inputs())
    for way in ("merge", "index"):
        with pytest.raises(NotImplementedError, match=f"way='{way}' takes share='none'"):
            context_parallel_attention(query, key, value, 4, layout=layout, share="all", way=way)
    with pytest.raises(ValueError, match="query must have the"):
        context_parallel_attention(query[:, :, 1:], key, value, 4, layout=layout)
    with pytest.raises(ValueError, match=f"the group's {size} ranks, got one of {size + 1}"):
        context_parallel_attention(query, key, value, 4, layout=Layout.even(T, size + 1))
    with pytest.raises(ValueError, match="way must be one of"):
        context_parallel_attention(query, key, value, 4, layout=layout, way="ring")
    with context_parallel(layout):
        for call in (
            lambda: sa.topk_attention(query, key, value, 4, key_lengths=torch.tensor([3, 3])),
            lambda: sa.nn.TopKAttention(32, 4, None)(torch.randn(1, 4, 32)),
            lambda: sa.nn.TopKAttention(32, 4, None, sink_logits=True)(torch.randn(1, 4, 32)),
            lambda: sa.nn.KeySelector(D, T, 4, num_heads=HQ).select(query),
            lambda: sa.nn.HeadApproximator(DV, 4, num_heads=HQ)(value, torch.zeros(B, 1, 3, 4).int()),
            lambda: AcrossRanks().select(query, key, 4, sa.selection.Rule(share="all")),
            lambda: sa.indexer_loss(query, key[:, :1], query[..., 0], query, key),
        ):
            with pytest.raises(NotImplementedError):
                call()
        with pytest.raises(ValueError, match="key_index is of one process's keys"):
            sa.topk_select(query, key, 4, key_index=sa.KeyIndex.of(key))
    with contextlib.suppress(ValueError):
        Layout((((0, 2),), ((3, 4),)))
        raise AssertionError
