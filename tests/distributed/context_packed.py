"""Context parallelism of packed documents and of varlen calls, whose sequences cross the ranks' boundaries."""

from __future__ import annotations

import pytest
import torch

import sparse_attn as sa
from distributed.whole import DV, HKV, HQ, WAYS, D, T, compare, inputs, lattice, layouts
from distributed.world import check
from sparse_attn.distributed import context_parallel, context_parallel_attention


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
