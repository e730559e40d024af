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


def tiled(size: int) -> dict[str, Layout]:
    """Layouts of 130 positions whose ranges begin at multiples of 16."""
    lengths = [48, 0, 32, 50] if size == 4 else [80, 50]
    ends = [16, 32, 64, 80, 96, 112, 128][: 2 * size - 1]
    chunks = list(zip([0, *ends], [*ends, 130], strict=True))
    crossed = Layout(tuple((chunks[r], chunks[-1 - r]) for r in range(size)))
    return {"uneven": Layout.contiguous(lengths), "crossed": crossed}


@check
def blocks_of_keys(rank, size):
    """Chosen for tiles of queries that no boundary splits; refined; attended to, with gradients."""
    tensors = inputs(queries=130, keys=130)
    sizes = {"block_size": 16, "query_tile": 16}
    for layout in tiled(size).values():
        here = [layout.local(t, rank, 2) for t in tensors]
        for options in (
            {"is_causal": True}, {}, {"is_causal": True, "pool": "bound", "share": "kv"}, {"share": "all"}
        ):  # fmt: skip
            visible = {"is_causal": options.get("is_causal", False)}
            right = sa.block_select(*tensors[:2], 4, **sizes, **options)
            tiles = torch.arange(-(-130 // 16)).repeat_interleave(16)[:130]
            tiles = layout.local(tiles, rank, 0).unique()
            leaves, parts = ([t.clone().requires_grad_() for t in each] for each in (tensors, here))
            out, lse = sa.block_attention(*leaves, right, **sizes, **visible, return_lse=True)
            weights = torch.randn_like(out)
            ((out * weights).sum() + lse.sum()).backward()
            refined = sa.refine_blocks(
                *tensors[:2], right, 9, **sizes, **visible, share=options.get("share", "none")
            )
            with context_parallel(layout):
                found = sa.block_select(*here[:2], 4, **sizes, **options)
                ours, our_lse = sa.block_attention(*parts, found, **sizes, **visible, return_lse=True)
                again = sa.refine_blocks(
                    *here[:2], found, 9, **sizes, **visible, share=options.get("share", "none")
                )
            assert torch.equal(found, right[:, :, tiles])
            assert torch.equal(again, layout.local(refined, rank, 2))
            ((ours * layout.local(weights, rank, 2)).sum() + our_lse.sum()).backward()
            torch.testing.assert_close(ours, layout.local(out, rank, 2))
            torch.testing.assert_close(our_lse, layout.local(lse, rank, 2))
            for part, leaf in zip(parts, leaves, strict=True):
                torch.testing.assert_close(part.grad, layout.local(leaf.grad, rank, 2), rtol=1e-4, atol=1e-5)
    layout = Layout.even(130, size)
    query, key, value = (layout.local(t, rank, 2) for t in tensors)
    with context_parallel(layout), pytest.raises(ValueError, match="must begin at a multiple of 16, got one"):
        sa.block_select(query, key, 4, is_causal=True, **sizes)
    layout = tiled(size)["crossed"]
    query, key, value = (layout.local(t, rank, 2) for t in inputs(batch=1, queries=130, keys=130))
    with (
        context_parallel(layout, cu_seq=torch.tensor([0, 50, 130])),
        pytest.raises(NotImplementedError, match="no key_starts and no documents"),
    ):
        sa.block_select(query, key, 4, is_causal=True, **sizes)
    with context_parallel(layout):
        with pytest.raises(NotImplementedError, match="does not know whose positions"):
            sa.block_select(query, key, 4, is_causal=True, causal_offset=3, **sizes)
        with pytest.raises(NotImplementedError, match="Hierarchical does not work inside"):
            sa.selection.Hierarchical().select(query, key, 64, sa.selection.Rule(is_causal=True))


@check
def inside_a_model(rank, size):
    """nn.TopKAttention under context_parallel, parameters' gradients summed: those of one process."""
    torch.manual_seed(1)
    indexer = sa.nn.Indexer(32)
    for options in (
        {},
        {"share": "all", "num_kv_heads": 2},
        {"selector": indexer},
        {"selector": sa.selection.Rounded()},
    ):
        attention = sa.nn.TopKAttention(32, 4, 6, window=2, sinks=1, **options)
        hidden, weights = torch.randn(2, T, 32), torch.randn(2, T, 32)
        out = attention(hidden)
        (out * weights).sum().backward()
        right = [p.grad for p in attention.parameters() if p.grad is not None]
        attention.zero_grad()
        for layout, way in (
            (Layout.zigzag(T, size), "gather"),
            (Layout.even(T, size), "merge"),
            (Layout.zigzag(T, size), "index"),
            (Layout.zigzag(T, size), "fetch"),
        ):
            if way in ("merge", "index") and "share" in options:
                continue
            with context_parallel(layout, way=way):
                ours = attention(layout.local(hidden, rank, 1))
                (ours * layout.local(weights, rank, 1)).sum().backward()
            torch.testing.assert_close(ours, layout.local(out, rank, 1), rtol=1e-5, atol=1e-5)
            for p, grad in zip((p for p in attention.parameters() if p.grad is not None), right, strict=True):
                torch.distributed.all_reduce(p.grad)
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)
            attention.zero_grad()


@check
def blocks_inside_a_model(rank, size):
    torch.manual_seed(1)
    blocks = sa.selection.Blocks(16, 16)
    for selector in (blocks, sa.selection.Refined(2, blocks)):
        attention = sa.nn.TopKAttention(32, 4, 48, num_kv_heads=2, selector=selector)
        hidden, weights = torch.randn(2, 130, 32), torch.randn(2, 130, 32)
        out = attention(hidden)
        (out * weights).sum().backward()
        right = [p.grad for p in attention.parameters()]
        attention.zero_grad()
        layout = tiled(size)["crossed"]
        with context_parallel(layout):
            ours = attention(layout.local(hidden, rank, 1))
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(out, rank, 1), rtol=1e-5, atol=1e-5)
        for p, grad in zip(attention.parameters(), right, strict=True):
            torch.distributed.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@check
def a_hugging_face_model(rank, size):
    """Its layers on parts of a sequence: logits and gradients of one process; what cannot be is a sentence."""
    if size > 2:  # two show it, and four would import transformers twice as often
        return
    transformers = pytest.importorskip("transformers")
    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, head_dim=8, **shape)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(40)[None] * 7 % 50
    cu_seq = torch.tensor([0, 11, 12, 40])
    places = torch.cat([torch.arange(int(n)) for n in cu_seq.diff()])
    weights = torch.randn(1, 40, 50)

    def here(layout, positions):
        at = {"position_ids": layout.local(positions, rank, 0)[None]}
        part = layout.local(ids, rank, 1)
        return model(part, attention_mask=torch.ones_like(part), **at).logits

    def gradients():
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    kinds = (
        ({"share": "none"}, "zigzag", "gather", None),
        ({"share": "kv", "window": 3, "sinks": 1}, "uneven", "gather", None),
        ({"selector": "int8"}, "zigzag", "fetch", None), ({"residual": True}, "zigzag", "gather", None),
        ({"share": "none", "sinks": 2}, "even", "merge", cu_seq),
        ({"share": "none", "sinks": 2}, "even", "index", cu_seq),
        ({"selector": "indexer"}, "zigzag", "fetch", cu_seq),
        ({"selector": "low_rank"}, "zigzag", "fetch", cu_seq),
        ({"top_k": 64}, "even", "gather", None),
    )  # fmt: skip
    for options, layout, way, documents in kinds:
        if options.get("selector") == "indexer":
            integration.add_indexers(model)
        if options.get("selector") == "low_rank":
            integration.fit_low_rank(model, [ids], rank=4)
        integration.configure(model, **{"top_k": 6, **options})
        positions = torch.arange(40) if documents is None else places
        right = model(ids, position_ids=positions[None]).logits
        (right * weights).sum().backward()
        wanted = gradients()
        layout = layouts(40, size)[layout]
        with context_parallel(layout, way=way, cu_seq=documents):
            ours = here(layout, positions)
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5, msg=str(options))
        for grad, all_grad in zip(gradients(), wanted, strict=True):
            torch.distributed.all_reduce(grad)
            torch.testing.assert_close(grad, all_grad, rtol=1e-3, atol=1e-4, msg=str(options))

    layout = Layout.zigzag(40, size)
    part, positions = layout.local(ids, rank, 1), layout.positions(rank)[None]
    ones = torch.ones_like(part)
    plain = {"attention_mask": ones, "position_ids": positions}
    padded = torch.arange(20)[None] >= 2
    apart, anew = torch.arange(20)[None] // 10 * 20 + torch.arange(20)[None], torch.arange(20)[None] % 10
    refused = (
        ({"top_k": None}, plain, "sparse in every layer"),
        ({"layers": [1]}, plain, "sparse in every layer"),
        ({}, {"position_ids": apart, "use_cache": False}, "attention_mask of ones"),
        ({}, {**plain, "attention_mask": padded}, "padding"),
        ({}, {**plain, "position_ids": anew}, "position_ids that begin anew"),
    )
    for options, given, words in refused:
        integration.configure(model, **{"top_k": 6, **options})
        with context_parallel(layout), pytest.raises(NotImplementedError, match=words):
            model(part, **given)
    integration.configure(model, top_k=6)
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    bounds = torch.tensor([0, 20], dtype=torch.int32)
    chosen = torch.zeros(1, 20, 3, dtype=torch.int32)
    for given, words in (
        ({"indices": chosen}, "takes no indices of a model's own, which LlamaAttention gives"),
        ({"is_causal": False}, "is causal, which LlamaAttention is not"),
        ({"cu_seq_lens_q": bounds}, "not by cu_seq_lens_q"),
        ({"cu_seq_lens_k": bounds}, "not by cu_seq_lens_q"),
    ):
        with context_parallel(layout), pytest.raises(NotImplementedError, match=words):
            integration.attention_forward(layer, query, key, key, None, **given)
    cache = transformers.DynamicCache()
    model(part[:, :3], past_key_values=cache)
    with (
        context_parallel(layout),
        pytest.raises(NotImplementedError, match="20 queries and 23 keys: no decoding"),
    ):
        model(part, past_key_values=cache, position_ids=positions, attention_mask=torch.ones(1, 23))
    with context_parallel(layout), pytest.raises(NotImplementedError, match="configure does not work inside"):
        integration.configure(model, top_k=6)

    # Whole blocks, and their best tokens: longer sequences, whose ranges begin at multiples of 64.
    ids, weights = torch.arange(256)[None] * 7 % 50, torch.randn(1, 256, 50)
    layout = Layout.zigzag(256, size)
    for selector in ("blocks", "refined_blocks"):
        integration.configure(model, top_k=192, selector=selector)
        right = model(ids).logits
        (right * weights).sum().backward()
        wanted = gradients()
        with context_parallel(layout):
            ours = here(layout, torch.arange(256))
            (ours * layout.local(weights, rank, 1)).sum().backward()
        torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5, msg=selector)
        for grad, all_grad in zip(gradients(), wanted, strict=True):
            torch.distributed.all_reduce(grad)
            torch.testing.assert_close(grad, all_grad, rtol=1e-3, atol=1e-4, msg=selector)
    with (
        context_parallel(layout, cu_seq=torch.tensor([0, 100, 256])),
        pytest.raises(NotImplementedError, match="no documents"),
    ):
        here(layout, torch.arange(256))


@check
def inside_torch_context_parallel(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    length = 8 * size
    q, k, v = (t.contiguous() for t in inputs(queries=length, keys=length))
    right = sa.topk_attention(q, k, v, 4, is_causal=True)
    mesh = init_device_mesh("cpu", (size,))
    layout = Layout.zigzag(length, size)
    with torch_context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        with pytest.raises(
            NotImplementedError, match=r"sparse_attn.distributed.context_parallel inside it does"
        ):
            sa.topk_attention(q, k, v, 4, is_causal=True)
        with context_parallel(layout):
            ours = sa.topk_attention(q, k, v, 4, is_causal=True)
    torch.testing.assert_close(ours, layout.local(right, rank, 2))


@check
def a_hugging_face_model_inside_torch_context_parallel(rank, size):
    """As accelerate's context parallelism has it: torch splits the inputs, and knows no attention but its own."""
    if size > 2:
        return
    transformers = pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    import sparse_attn.integrations.transformers as integration

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **shape))
    integration.configure(model, top_k=5)
    ids, positions, ones = torch.arange(32)[None] * 7 % 50, torch.arange(32)[None], torch.ones(1, 32)
    right = model(ids, position_ids=positions).logits
    layout = Layout.zigzag(32, size)
    buffers = [ids, positions, ones]
    with torch_context_parallel(init_device_mesh("cpu", (size,)), buffers=buffers, buffer_seq_dims=[1, 1, 1]):
        with pytest.raises(NotImplementedError, match="context_parallel inside it does"):
            model(ids, position_ids=positions, attention_mask=ones)
        with context_parallel(layout):
            ours = model(ids, position_ids=positions, attention_mask=ones).logits
    torch.testing.assert_close(ours, layout.local(right, rank, 1), rtol=1e-4, atol=1e-5)


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
