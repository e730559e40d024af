"""What checks of context parallelism share: inputs, layouts, the comparison with one process that has it all."""

from __future__ import annotations

import torch
from torch import Tensor

import sparse_attn as sa
from sparse_attn.distributed import Layout, context_parallel_attention

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
