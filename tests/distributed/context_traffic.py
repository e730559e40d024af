"""What context parallelism sends: bytes as counted, and as the cost model says."""

from __future__ import annotations

import torch

from distributed.whole import DV, HKV, HQ, B, D, compare, inputs
from distributed.world import check
from sparse_attn.analysis import Shape
from sparse_attn.distributed import Layout, context_costs, context_parallel_attention, count_bytes


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
