"""DTensors in, DTensors out: every op, forward and backward, replicated, by batch, by heads, by positions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import sparse_attn as sa
from distributed.world import check
from sparse_attn.selection import Refined, Rule, Selection

B, HQ, HKV, T, D, DV = 3, 8, 4, 33, 8, 12
HOW = {"replicated": Replicate(), "batch": Shard(0), "heads": Shard(1)}


def inputs(*shapes, seed=5):
    torch.manual_seed(seed)
    return [torch.randn(s) for s in shapes]


ATTENTION = (B, HQ, T, D), (B, HKV, T, D), (B, HKV, T, DV)


def results(found):
    return found if isinstance(found, tuple) else (found,)


def compare(mesh, function, tensors, placements, others=(), wanted=None, tolerance=1e-5):
    """`function(*tensors, *others)` of DTensors against that of plain ones; `others` get no gradient.

    An entry of `tensors` that is a list is given whole to the function.
    """
    plain = [t.clone().requires_grad_() for t in tensors]
    right = results(function(*plain, *others))
    parts = [distribute_tensor(t.detach().clone(), mesh, placements(t)).requires_grad_() for t in tensors]
    shards = [None if t is None else distribute_tensor(t, mesh, placements(t)) for t in others]
    found = results(function(*parts, *shards))
    loss, ours_loss = 0.0, 0.0
    for ours, one in zip(found, right, strict=True):
        assert isinstance(ours, DTensor)
        assert ours.shape == one.shape
        if wanted is not None:
            assert ours.placements == tuple(wanted), ours.placements
        if not one.is_floating_point():
            assert torch.equal(ours.full_tensor(), one)
            continue
        torch.testing.assert_close(ours.full_tensor(), one, rtol=tolerance, atol=tolerance)
        weights = torch.rand_like(one)
        loss = loss + (torch.where(one.isfinite(), one, 0.0) * weights).sum()
        spread = distribute_tensor(weights, mesh, [Replicate()] * mesh.ndim)
        ours_loss = ours_loss + (ours * spread).sum()
    if not isinstance(loss, float) and loss.requires_grad:
        loss.backward()
        ours_loss.backward()
        for part, one in zip(parts, plain, strict=True):
            if one.grad is None:
                assert part.grad is None
                continue
            torch.testing.assert_close(part.grad.full_tensor(), one.grad, rtol=tolerance, atol=tolerance)


def by(placement):
    """Placements of a tensor: by heads only what has a heads axis."""

    def of(tensor):
        if isinstance(placement, Shard) and (
            tensor.dim() <= placement.dim or tensor.shape[placement.dim] == 1
        ):
            return [Replicate()]
        return [placement]

    return of


@check
def attention(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    flags = {"return_lse": True, "return_indices": True}
    for placement in HOW.values():
        for share in ("none", "kv"):
            compare(
                mesh,
                lambda q, k, v, share=share: sa.topk_attention(
                    q, k, v, 5, is_causal=True, window=2, share=share, **flags
                ),
                inputs(*ATTENTION), by(placement), wanted=[placement],
            )  # fmt: skip
        compare(
            mesh, lambda q, k: sa.topk_select(q, k, 5, is_causal=True), inputs(*ATTENTION[:2]), by(placement)
        )
        compare(mesh, lambda q, k: sa.quantized_select(q, k, 5), inputs(*ATTENTION[:2]), by(placement))
    for placement in (Replicate(), Shard(0)):
        compare(
            mesh, lambda q, k, v: sa.topk_attention(q, k, v, 5, is_causal=True, share="all", **flags),
            inputs(*ATTENTION), by(placement), wanted=[placement],
        )  # fmt: skip


@check
def attention_with_tensors_in_the_rule(rank, size):
    """Plain ones are the same on every rank; sinks get the gradient of all parts."""
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(2)
    mask = torch.rand(B, HQ, T, T) < 0.6
    lengths, starts = torch.tensor([33, 20, 5]), torch.randint(0, 9, (B, T))
    for placement in HOW.values():
        for small in (mask, mask[:, :1], mask[:1], mask[0, 0]):
            compare(
                mesh,
                lambda q, k, v, small=small: sa.topk_attention(
                    q, k, v, 5, attn_mask=small, key_lengths=lengths, key_starts=starts
                ),
                inputs(*ATTENTION), by(placement),
            )  # fmt: skip
        logits = torch.randn(HQ)
        plain = [t.requires_grad_() for t in (*inputs(*ATTENTION), logits.clone())]
        sa.topk_attention(*plain[:3], 5, sink_logits=plain[3], softcap=2.0).sum().backward()
        parts = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in plain[:3]]
        sink = distribute_tensor(
            logits, mesh, [Shard(0) if placement == Shard(1) else Replicate()]
        ).requires_grad_()
        sa.topk_attention(*parts, 5, sink_logits=sink, softcap=2.0).sum().backward()
        for ours, right in zip((*parts, sink), plain, strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), right.grad, rtol=1e-4, atol=1e-5)


def selected(rule, q, k, v):
    selector = Refined(2, sa.selection.Blocks(16, 16))
    return sa.attend(q, k, v, selector.select(q, k, 48, rule), rule=rule)


@check
def other_ops(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    q, k, v = inputs((B, HQ, 130, D), (B, HKV, 130, D), (B, HKV, 130, DV))
    sizes = {"block_size": 16, "query_tile": 16}
    blocks = sa.block_select(q, k, 3, is_causal=True, **sizes)
    rule = Rule(is_causal=True)
    for placement in HOW.values():
        indices = sa.topk_select(q, k, 5)
        compare(
            mesh, lambda q, k, v, i: sa.gathered_attention(q, k, v, i, return_lse=True), [q, k, v], by(placement),
            [indices], wanted=[placement],
        )  # fmt: skip
        compare(mesh, sa.gathered_attention, [q, k, v], by(placement), [indices[:, :1]], wanted=[placement])
        compare(mesh, lambda q, k: sa.block_select(q, k, 3, is_causal=True, **sizes), [q, k], by(placement))
        compare(
            mesh, partial(sa.block_attention, is_causal=True, return_lse=True, **sizes), [q, k, v], by(placement),
            [blocks], wanted=[placement],
        )  # fmt: skip
        compare(
            mesh,
            lambda q, k, b: sa.refine_blocks(q, k, b, 9, is_causal=True, **sizes),
            [q, k],
            by(placement),
            [blocks],
        )
        compare(
            mesh, lambda q, k, v: sa.topk_attention_with_residual(q, k, v, 9, is_causal=True), [q, k, v], by(placement),
            wanted=[placement],
        )  # fmt: skip
        compare(
            mesh, partial(selected, rule), [q, k, v],
            by(placement),
        )  # fmt: skip
        compare(
            mesh, lambda q, k, v: sa.topk_attention(q, k, v, 9, is_causal=True, tail="blocks"), [q, k, v],
            by(placement), wanted=[placement],
        )  # fmt: skip


@check
def indexers(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    query, key, weights, q, k = inputs((B, 8, T, D), (B, 4, T, D), (B, 8, T), (B, HQ, T, D), (B, HKV, T, D))
    for placement in HOW.values():
        compare(
            mesh, lambda *t: sa.indexer_select(*t, 5, is_causal=True), [query, key, weights], by(placement)
        )
        compare(
            mesh, partial(sa.indexer_loss, is_causal=True), [query, key, weights], by(placement), [q, k],
            tolerance=1e-4,
        )  # fmt: skip


@check
def packed_sequences(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    cu_seq = torch.tensor([0, 12, 12, 20])
    q, k, v = inputs((20, HQ, D), (20, HKV, D), (20, HKV, DV))
    weights = inputs((20, 8, D), (20, 4, D), (20, 8))
    sizes = {"block_size": 4, "query_tile": 4, "is_causal": True}

    def attend(q, k, v):
        return sa.varlen_topk_attention(q, k, v, cu_seq, None, 12, 12, 5, is_causal=True, return_indices=True)

    def select(q, k):
        return sa.varlen_topk_select(q, k, cu_seq, None, 12, 12, 5, is_causal=True)

    def attend_to(q, k, v, indices):
        return sa.varlen_gathered_attention(q, k, v, indices, cu_seq, None, 12, 12, return_lse=True)

    def select_blocks(q, k):
        return sa.varlen_block_select(q, k, cu_seq, None, 12, 12, 2, **sizes)

    def attend_blocks(q, k, v, blocks):
        return sa.varlen_block_attention(q, k, v, blocks, cu_seq, None, 12, 12, return_lse=True, **sizes)

    def by_indexer(q, k, w):
        return sa.varlen_indexer_select(q, k, w, cu_seq, None, 12, 12, 5, is_causal=True)

    blocks = select_blocks(q, k)
    for placement in (Replicate(), Shard(1), Shard(0)):  # whole, heads, tokens
        compare(mesh, attend, [q, k, v], by(placement))
        compare(mesh, select, [q, k], by(placement))
        compare(mesh, attend_to, [q, k, v], by(placement), [select(q, k)], wanted=[placement])
        compare(mesh, by_indexer, weights, by(placement))
        if placement == Shard(0):
            with pytest.raises(NotImplementedError, match="nor blocks of packed sequences"):
                select_blocks(*(distribute_tensor(t, mesh, [placement]) for t in (q, k)))
            continue
        compare(mesh, select_blocks, [q, k], by(placement))
        compare(mesh, attend_blocks, [q, k, v], by(placement), [blocks], wanted=[placement])


@check
def positions(rank, size):
    """Sharded by positions, queries and keys alike: keys are gathered, indices are global."""
    mesh = init_device_mesh("cpu", (size,))
    flags = {"return_lse": True, "return_indices": True}
    for share in ("none", "kv", "all"):
        compare(
            mesh,
            lambda q, k, v, share=share: sa.topk_attention(
                q, k, v, 5, is_causal=True, window=2, sinks=1, share=share, **flags
            ),
            inputs(*ATTENTION), by(Shard(2)), wanted=[Shard(2)],
        )  # fmt: skip
    indices = sa.topk_select(*inputs(*ATTENTION)[:2], 5)
    compare(mesh, sa.gathered_attention, inputs(*ATTENTION), by(Shard(2)), [indices], wanted=[Shard(2)])
    length = 64 * size - 1  # tiles of 16, of which the last is short
    q, k, v = inputs((B, HQ, length, D), (B, HKV, length, D), (B, HKV, length, DV))
    sizes = {"block_size": 16, "query_tile": 16, "is_causal": True}
    blocks = sa.block_select(q, k, 3, **sizes)
    compare(
        mesh, partial(sa.block_attention, return_lse=True, **sizes), [q, k, v], by(Shard(2)), [blocks],
        wanted=[Shard(2)],
    )  # fmt: skip
    compare(mesh, lambda q, k: sa.block_select(q, k, 3, **sizes), [q, k], by(Shard(2)), wanted=[Shard(2)])
    compare(
        mesh, lambda q, k, b: sa.refine_blocks(q, k, b, 9, **sizes), [q, k], by(Shard(2)), [blocks],
        wanted=[Shard(2)],
    )  # fmt: skip
    compare(mesh, partial(selected, Rule(is_causal=True)), [q, k, v], by(Shard(2)), wanted=[Shard(2)])


@check
def two_dimensions(rank, size):
    if size < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    flags = {"return_lse": True, "return_indices": True}
    for placements in (
        [Shard(0), Shard(1)],
        [Shard(1), Shard(1)],
        [Shard(0), Shard(2)],
        [Replicate(), Shard(1)],
    ):
        compare(
            mesh, lambda q, k, v: sa.topk_attention(q, k, v, 5, is_causal=True, **flags), inputs(*ATTENTION),
            lambda t, p=placements: p, wanted=placements,
        )  # fmt: skip


@check
def compiled(rank, size):
    if size > 2:
        return
    mesh = init_device_mesh("cpu", (size,))
    parts = [distribute_tensor(t, mesh, [Shard(1)]).requires_grad_() for t in inputs(*ATTENTION)]

    def attend(q, k, v):
        return sa.topk_attention(q, k, v, 5, is_causal=True)

    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(*parts)
    right = attend(*parts)
    torch.testing.assert_close(out.full_tensor(), right.full_tensor())
    grads = torch.autograd.grad(out.sum(), parts), torch.autograd.grad(right.sum(), parts)
    for ours, one in zip(*grads, strict=True):
        torch.testing.assert_close(ours.full_tensor(), one.full_tensor())


@check
def a_recipe_for_local_map(rank, size):
    """The page's: keys of a static cache that is split by heads; lengths are plain and the same everywhere."""
    from torch.distributed.tensor.experimental import local_map

    mesh, lengths = init_device_mesh("cpu", (size,)), torch.tensor([33, 20, 5])
    attend = local_map(
        partial(sa.topk_attention, top_k=7, key_lengths=lengths),
        out_placements=[Shard(1)],
        in_placements=([Shard(1)], [Shard(1)], [Shard(1)]),
    )
    tensors = inputs(*ATTENTION)
    parts = [distribute_tensor(t, mesh, [Shard(1)]).requires_grad_() for t in tensors]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, right = attend(*parts), sa.topk_attention(*leaves, 7, key_lengths=lengths)
    torch.testing.assert_close(out.full_tensor(), right)
    out.sum().full_tensor().backward()
    right.sum().backward()
    for part, leaf in zip(parts, leaves, strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), leaf.grad, rtol=1e-4, atol=1e-5)


@check
def what_is_refused(rank, size):
    mesh = init_device_mesh("cpu", (size,))

    def spread(placement, *tensors):
        return [distribute_tensor(t, mesh, [placement]) for t in tensors]

    q, k, v = inputs(*ATTENTION)
    parts = spread(Shard(1), q, k, v)
    with pytest.raises(
        ValueError, match=r"share='all' is one selection of all heads, and the mesh splits the heads"
    ):
        sa.topk_attention(*parts, 5, share="all")
    with pytest.raises(ValueError, match=r"key has 1 heads, which the mesh would split"):
        sa.topk_attention(parts[0], *spread(Replicate(), k[:, :1], v[:, :1]), 5)
    with pytest.raises(ValueError, match=r"query must be whole in dimension 3 \(the last\)"):
        sa.topk_attention(*spread(Shard(3), q, k, v), 5)
    with pytest.raises(TypeError, match=r"key must be a DTensor, as other arguments are"):
        sa.topk_attention(parts[0], k, v, 5)
    with pytest.raises(ValueError, match=r"tiles of 12 queries, which must not be split"):
        sa.block_select(*spread(Shard(2), q, k), 3, block_size=12, query_tile=12)
    with pytest.raises(NotImplementedError, match=r"no key_starts and no documents"):
        sa.block_select(
            *spread(Shard(2), q, k), 3, query_tile=1, key_starts=torch.zeros(B, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match="key_index is of one process's keys"):
        sa.topk_attention(*spread(Shard(0), q, k, v), 5, key_index=sa.KeyIndex.of(k))
    pages = spread(Replicate(), k.transpose(1, 2), v.transpose(1, 2))  # [pages, size, Hkv, D]
    with pytest.raises(NotImplementedError, match=r"pages .* are not split over ranks"):
        sa.varlen_topk_attention(
            *spread(Replicate(), q[0].transpose(0, 1)), *pages, torch.tensor([0, T]), None, T, 3 * T, 5,
            seqused_k=torch.tensor([T]), block_table=torch.tensor([[0, 1, 2]], dtype=torch.int32),
        )  # fmt: skip
    sums = DTensor.from_local(q / size, mesh, [Partial()])
    out = sa.topk_attention(sums, *spread(Replicate(), k, v), 5)
    torch.testing.assert_close(out.full_tensor(), sa.topk_attention(q, k, v, 5), rtol=1e-4, atol=1e-5)


@check
def selections(rank, size):
    """`attend` takes DTensors of indices as they come from a selector."""
    mesh = init_device_mesh("cpu", (size,))
    q, k, v = (distribute_tensor(t, mesh, [Shard(0)]) for t in inputs(*ATTENTION))
    indices = sa.topk_select(q, k, 5)
    out = sa.attend(q, k, v, Selection(indices))
    assert out.placements == (Shard(0),)
