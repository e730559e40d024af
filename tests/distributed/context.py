"""Context parallelism against one process: indices to the bit, outputs and gradients within rounding."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import sparse_attn as sa
from distributed.world import check
from sparse_attn.analysis import Shape
from sparse_attn.distributed import (
    AcrossRanks,
    Layout,
    context_costs,
    context_parallel,
    context_parallel_attention,
    context_parallel_gathered_attention,
    count_bytes,
)

B, HQ, HKV, T, D, DV = 2, 4, 2, 45, 16, 12
WAYS = "gather", "merge", "index"


def inputs(batch=B, heads=HQ, kv_heads=HKV, queries=T, keys=T, make=torch.randn, dtype=torch.float32):
    torch.manual_seed(3)
    shapes = (batch, heads, queries, D), (batch, kv_heads, keys, D), (batch, kv_heads, keys, DV)
    return [make(*s).to(dtype) for s in shapes]


def lattice(*shape: int) -> Tensor:
    """Small whole numbers: many ties."""
    return torch.randint(-2, 3, shape).float()


def layouts(length: int, size: int) -> dict[str, Layout]:
    uneven = [length - 7 - (size - 2) * 3, 7, *[3] * (size - 2)]
    return {
        "even": Layout.even(length, size),
        "zigzag": Layout.zigzag(length, size),
        "uneven": Layout.contiguous(uneven),
        "empty": Layout.contiguous([0, length, *[0] * (size - 2)]),
    }


def compare(
    rank, tensors, top_k, layout, key_layout=None, way="gather", cu_seq=None, tolerance=2e-5, **options
):
    """Against one process that has it all."""
    keys = key_layout or layout
    whole = [t.clone().requires_grad_() for t in tensors]
    sink = options.pop("sink_logits", None)
    sinks = [None if sink is None else sink.clone().requires_grad_() for _ in range(2)]
    one = dict(options)
    if cu_seq is not None:
        starts = torch.repeat_interleave(cu_seq[:-1], cu_seq.diff())
        one["key_starts"] = starts[None]
    asked = {"return_lse": True, "return_indices": True}
    out, lse, indices = sa.topk_attention(*whole, top_k, sink_logits=sinks[0], **one, **asked)
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    there = torch.where(lse.isfinite(), lse, 0.0)
    ((out * weights).sum() + (there * lse_weights).sum()).backward()

    parts = [
        lay.local(t, rank, 2).clone().requires_grad_()
        for lay, t in zip((layout, keys, keys), tensors, strict=True)
    ]
    if "attn_mask" in options and options["attn_mask"].shape[2] > 1:
        options["attn_mask"] = layout.local(options["attn_mask"], rank, 2)
    ours, our_lse, our_indices = context_parallel_attention(
        *parts,
        top_k,
        layout=layout,
        key_layout=key_layout,
        way=way,
        cu_seq=cu_seq,
        sink_logits=sinks[1],
        **options,
        **asked,
    )
    there = torch.where(our_lse.isfinite(), our_lse, 0.0)
    loss = (ours * layout.local(weights, rank, 2)).sum() + (there * layout.local(lse_weights, rank, 2)).sum()
    loss.backward()
    assert torch.equal(our_indices, layout.local(indices, rank, 2))
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(ours, layout.local(out, rank, 2), **close)
    torch.testing.assert_close(our_lse, layout.local(lse, rank, 2), **close)
    for ours, lay, right in zip(parts, (layout, keys, keys), whole, strict=True):
        torch.testing.assert_close(ours.grad, lay.local(right.grad, rank, 2), **close)
    if sink is not None:
        total = sinks[1].grad.clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total, sinks[0].grad, **close)


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
def half_types(rank, size):
    layout = Layout.zigzag(T, size)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for way in WAYS:
            compare(rank, inputs(dtype=dtype), 7, layout, way=way, is_causal=True, tolerance=4e-2)
    for way in WAYS:
        with torch.autocast("cpu", torch.bfloat16):
            compare(rank, inputs(), 7, layout, way=way, is_causal=True, tolerance=4e-2)


@check
def packed_documents(rank, size):
    """Documents that cross the ranks' boundaries, an empty one among them."""
    cu_seq = torch.tensor([0, 11, 11, 29, 30, T])
    tensors = inputs(batch=1)
    for layout in layouts(T, size).values():
        for way in WAYS:
            options = {"is_causal": True, "cu_seq": cu_seq, "way": way}
            compare(rank, tensors, 6, layout, **options)
            compare(rank, tensors, 6, layout, window=2, sinks=2, **options)
            compare(rank, inputs(batch=1, make=lattice), 6, layout, sinks=2, tolerance=1e-4, **options)


@check
def packed_calls(rank, size):
    """varlen_… with each rank's tokens: sequences that cross boundaries, whole and causal, used in part; all ways."""
    torch.manual_seed(5)
    q, k, v = (torch.randn(T, h, d) for h, d in ((HQ, D), (HKV, D), (HKV, DV)))
    weights = torch.randn(T, HQ)
    cu_seq = torch.tensor([0, 11, 11, 29, 30, T - 3])
    sizes = cu_seq, None, 18, 18
    for layout in layouts(T, size).values():
        here = [layout.local(t, rank, 0) for t in (q, k, v)]
        for way, options in (
            ("gather", {}), ("gather", {"is_causal": True, "window": 2, "sinks": 1, "share": "kv"}),
            ("gather", {"seqused_k": torch.tensor([7, 0, 18, 1, 9]), "is_causal": True}),
            ("gather", {"tail": "mean", "is_causal": True}), ("gather", {"tail": "blocks"}),
            ("merge", {"is_causal": True, "window": 2}), ("index", {"is_causal": True, "sinks": 2}),
            ("index", {"is_causal": True, "tail": "mean"}),
        ):  # fmt: skip
            asked = {"return_lse": True, "return_indices": True, **options}
            leaves, parts = ([t.clone().requires_grad_() for t in each] for each in ((q, k, v), here))
            out, lse, indices = sa.varlen_topk_attention(*leaves, *sizes, 6, **asked)
            with context_parallel(layout, way=way):
                ours, our_lse, found = sa.varlen_topk_attention(*parts, *sizes, 6, **asked)
            assert torch.equal(found, layout.local(indices, rank, 0))
            torch.testing.assert_close(ours, layout.local(out, rank, 0))
            torch.testing.assert_close(our_lse, layout.local(lse, rank, 0))
            out.square().sum().backward()
            ours.square().sum().backward()
            for part, leaf in zip(parts, leaves, strict=True):
                torch.testing.assert_close(part.grad, layout.local(leaf.grad, rank, 0), rtol=1e-4, atol=1e-5)
        indices = sa.varlen_topk_select(q, k, *sizes, 6)
        right = sa.varlen_gathered_attention(q, k, v, indices, *sizes)
        own = sa.varlen_indexer_select(q, k[:, :1], weights, *sizes, 5, is_causal=True)
        for way in ("gather", "fetch"):
            with context_parallel(layout, way=way):
                found = sa.varlen_topk_select(*here[:2], *sizes, 6)
                ours = sa.varlen_gathered_attention(*here, found, *sizes)
                by_indexer = sa.varlen_indexer_select(
                    here[0], here[1][:, :1], layout.local(weights, rank, 0), *sizes, 5, is_causal=True
                )
            assert torch.equal(found, layout.local(indices, rank, 0))
            assert torch.equal(by_indexer, layout.local(own, rank, 0))
            torch.testing.assert_close(ours, layout.local(right, rank, 0))
    with context_parallel(layout):
        with pytest.raises(NotImplementedError, match="nor blocks of packed sequences"):
            sa.varlen_block_select(*here[:2], *sizes, 2, block_size=4, query_tile=4)
        with pytest.raises(ValueError, match="cu_seq_q must rise from 0 to at most 45"):
            sa.varlen_topk_select(*here[:2], torch.tensor([0, T + 9]), None, T + 9, T + 9, 6)
    for way in ("merge", "index"):
        with (
            context_parallel(layout, way=way),
            pytest.raises(NotImplementedError, match="one causal_offset for all"),
        ):
            sa.varlen_topk_attention(*here, *sizes, 6)
    with context_parallel(layout, cu_seq=cu_seq), pytest.raises(ValueError, match="has a cu_seq of its own"):
        sa.varlen_topk_attention(*here, *sizes, 6)
    # Documents of a model that sees them whole.
    tensors = inputs(batch=1)
    lengths = (
        torch.repeat_interleave(cu_seq[:-1], cu_seq.diff()),
        torch.repeat_interleave(cu_seq[1:], cu_seq.diff()),
    )
    outside = torch.full((3,), T)
    starts, ends = (torch.cat((n, outside)) for n in lengths)
    visible = (torch.arange(T) >= starts[:, None]) & (torch.arange(T) < ends[:, None])
    out, indices = sa.topk_attention(*tensors, 6, attn_mask=visible, return_indices=True)
    for layout in layouts(T, size).values():
        parts = [layout.local(t, rank, 2) for t in tensors]
        ours, found = context_parallel_attention(*parts, 6, layout=layout, cu_seq=cu_seq, return_indices=True)
        assert torch.equal(found, layout.local(indices, rank, 2))
        torch.testing.assert_close(ours, layout.local(out, rank, 2))


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


@check
def most_keys_stay_where_they_are(rank, size):
    """Bounds of 8 bits leave little more than is chosen: clusters of keys, as attention has them."""
    torch.manual_seed(7)
    length, top_k, dim = 4096, 64, 64
    centers = 2 * torch.randn(B, HKV, 32, dim)
    key = (centers[:, :, torch.randint(32, (length,))] + torch.randn(B, HKV, length, dim)).bfloat16()
    query, value = torch.randn(B, HQ, 5, dim).bfloat16(), torch.randn(B, HKV, length, DV).bfloat16()
    queries, keys = Layout.contiguous([5, *[0] * (size - 1)]), Layout.even(length, size)
    options = {"key_layout": keys, "way": "index", "is_causal": True, "causal_offset": length - 5}
    compare(rank, [query, key, value], top_k, queries, tolerance=4e-2, window=8, sinks=4, **options)
    with count_bytes() as traffic:
        parts = [keys.local(t, rank, 2) for t in (key, value)]
        context_parallel_attention(queries.local(query, rank, 2), *parts, top_k, layout=queries, **options)
    own = length // size
    sums = dim * 4  # of the mean
    assert traffic.sent["key index"] == (size - 1) * B * HKV * (own * (dim + 12) + sums)
    if rank == 0:
        assert "candidate keys" not in traffic.sent or traffic.sent["candidate keys"] == 0
    else:
        chosen = traffic.sent["chosen values"] / (2 * DV)
        survivors = traffic.sent["candidate keys"] / (2 * dim)
        assert chosen <= survivors < 2 * chosen < 0.5 * B * HKV * own, (chosen, survivors)


@check
def bytes_are_counted(rank, size):
    """Of the algorithms, not of the wires: gathered keys, and queries that travel."""
    layout = Layout.even(64, size)
    query, key, value = (layout.local(t, rank, 2) for t in inputs(queries=64, keys=64))
    with count_bytes() as traffic:
        context_parallel_attention(query, key, value, 4, layout=layout, is_causal=True)
    own = 64 // size
    assert traffic.sent == {
        "key": (size - 1) * B * HKV * own * D * 4,
        "value": (size - 1) * B * HKV * own * DV * 4,
    }
    with count_bytes() as traffic:
        context_parallel_attention(query, key, value, 4, layout=layout, is_causal=True, way="merge")
    assert traffic.sent["queries"] == (size - 1) * B * HQ * own * D * 4
    assert traffic.sent["partial outputs"] == (size - 1) * B * HQ * own * (DV + 1) * 4
    assert traffic.total == sum(traffic.sent.values())


@check
def the_model_counts_what_is_sent(rank, size):
    """Forward and backward bytes of each way: those that context_costs says."""
    layout, shape = Layout.even(64, size), Shape(64, HQ, D, HKV, batch=B)
    for way, costs in context_costs(shape, size, 6).items():
        if way in ("ring", "index"):  # of which the latter's rows depend on the keys
            continue
        query, key, _ = (layout.local(t, rank, 2) for t in inputs(queries=64, keys=64))
        leaves = [t.clone().requires_grad_() for t in (query, key, key)]
        with count_bytes() as traffic:
            out = context_parallel_attention(*leaves, 6, layout=layout, way=way, is_causal=True)
        extra = sum(
            traffic.sent.get(what, 0) for what in ("bounds", "fetch")
        )  # what the merge's exactness costs
        assert traffic.total - extra == costs.forward_bytes, (way, traffic.sent)
        with count_bytes() as traffic:
            out.sum().backward()
        assert traffic.total == costs.backward_bytes, (way, traffic.sent)


@check
def the_model_counts_what_an_index_sends(rank, size):
    """Where all keys are chosen, to the byte, and else no less."""
    layout, shape = Layout.even(64, size), Shape(64, HQ, D, HKV, batch=B)
    for top_k in (1, 3, 64):
        costs = context_costs(shape, size, top_k)["index"]
        query, key, _ = (layout.local(t, rank, 2).requires_grad_() for t in inputs(queries=64, keys=64))
        with count_bytes() as forward:
            out = context_parallel_attention(query, key, key, top_k, layout=layout, way="index")
        with count_bytes() as backward:
            out.sum().backward()
        counted = torch.tensor([forward.total, backward.total])
        torch.distributed.all_reduce(counted)
        assert counted[0] <= size * costs.forward_bytes, (top_k, forward.sent, costs)
        assert counted[1] <= size * costs.backward_bytes
        if top_k == 64:
            assert (forward.total, backward.total) == (costs.forward_bytes, costs.backward_bytes)


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
