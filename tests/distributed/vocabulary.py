"""A vocabulary split over ranks, and the wrappers of torch around embeddings and heads, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import sparse_attn as sa
from distributed.world import check
from sparse_attn.distributed import (
    VocabParallel,
    split_plan,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)

D = 12


def plan(vocabulary=41):
    """Bands of 1, 7 and the rest: with 4 ranks some have nothing of the first, and the sizes are uneven."""
    torch.manual_seed(0)
    band = torch.full((vocabulary,), 2, dtype=torch.int32)
    order = torch.randperm(vocabulary)
    band[order[0]], band[order[1:8]] = 0, 1
    return sa.WidthPlan(D, (D, 6, 3), band)


def split(embedding, rank, size):
    """(this rank's rows of the tables, projections), leaves."""
    rows = []
    for table in embedding.tables:
        step = -(-len(table) // size)
        rows.append(table.detach()[rank * step : (rank + 1) * step].clone().requires_grad_())
    projections = [
        None if p is None else p.detach().clone().requires_grad_() for p in embedding.projection_list()
    ]
    return rows, projections


def assert_gradients(embedding, rows, projections, rank, size):
    for table, own in zip(embedding.tables, rows, strict=True):
        step = -(-len(table) // size)
        torch.testing.assert_close(
            own.grad, table.grad[rank * step : (rank + 1) * step], rtol=1e-4, atol=1e-5
        )
    for one, own in zip(embedding.projection_list(), projections, strict=True):
        if own is not None:
            total = torch.zeros_like(own) if own.grad is None else own.grad
            dist.all_reduce(total)
            torch.testing.assert_close(total, one.grad, rtol=1e-4, atol=1e-5)


@check
def lookup(rank, size):
    for padding in (None, 3, -1):
        embedding = sa.nn.VariableWidthEmbedding(plan(), padding)
        maps = embedding.token_band, embedding.token_row
        for ids in (
            torch.arange(41).view(1, 41),
            torch.tensor([7, 7, 0]),
            torch.empty(2, 0, dtype=torch.int64),
        ):
            embedding.zero_grad()
            out = embedding(ids)
            weights = torch.randn_like(out)
            (out * weights).sum().backward()
            rows, projections = split(embedding, rank, size)
            ours = vocab_parallel_embedding(ids, rows, projections, *maps, padding_idx=padding)
            torch.testing.assert_close(ours, out, rtol=1e-6, atol=1e-6)
            (ours * weights).sum().backward()
            assert_gradients(embedding, rows, projections, rank, size)


@check
def loss(rank, size):
    torch.manual_seed(1)
    head = sa.nn.VariableWidthHead.from_plan(plan())
    maps = head.embedding.token_band, head.embedding.token_row
    hidden, targets = 3 * torch.randn(5, 4, D), torch.randint(41, (5, 4))
    targets[0], targets[2, 1] = -100, -100
    hidden[0, 0] = torch.nan  # of an ignored target
    weight = torch.rand(41)
    for options in (
        {}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"weight": weight},
        {"label_smoothing": 0.3, "weight": weight, "reduction": "sum"}, {"ignore_index": 7},
    ):  # fmt: skip
        given = torch.where(targets == -100, options.get("ignore_index", -100), targets)
        head.zero_grad()
        one, ours = (hidden.clone().requires_grad_() for _ in range(2))
        right = head.loss(one, given, **options)
        right.sum().backward()
        rows, projections = split(head.embedding, rank, size)
        found = vocab_parallel_cross_entropy(ours, given, rows, projections, *maps, **options)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
        found.sum().backward()
        torch.testing.assert_close(ours.grad, one.grad, rtol=1e-4, atol=1e-5)
        assert_gradients(head.embedding, rows, projections, rank, size)
    nothing = vocab_parallel_cross_entropy(hidden, torch.full_like(targets, -100), rows, projections, *maps)
    assert nothing.isnan()


@check
def half_types(rank, size):
    """Within the error that one process makes in that type, and a little."""
    torch.manual_seed(1)
    head = sa.nn.VariableWidthHead.from_plan(plan(), dtype=torch.bfloat16)
    hidden, targets = torch.randn(64, D).bfloat16(), torch.randint(41, (64,))
    exact = copy.deepcopy(head).double().loss(hidden.double(), targets, reduction="none")
    one = head.loss(hidden, targets, reduction="none")
    rows, projections = split(head.embedding, rank, size)
    maps = head.embedding.token_band, head.embedding.token_row
    ours = vocab_parallel_cross_entropy(hidden, targets, rows, projections, *maps, reduction="none")
    assert (ours - exact).abs().max() <= 1.5 * (one - exact).abs().max() + 1e-5


@check
def more_ranks_than_rows(rank, size):
    """Two tokens: at four ranks two have nothing at all."""
    small = sa.WidthPlan(D, (D,), torch.zeros(2, dtype=torch.int32))
    head = sa.nn.VariableWidthHead.from_plan(small)
    hidden, targets = torch.randn(3, D).requires_grad_(), torch.tensor([0, 1, -100])
    head.loss(hidden, targets).backward()
    rows, projections = split(head.embedding, rank, size)
    maps = head.embedding.token_band, head.embedding.token_row
    ours = hidden.detach().clone().requires_grad_()
    vocab_parallel_cross_entropy(ours, targets, rows, projections, *maps).backward()
    torch.testing.assert_close(ours.grad, hidden.grad)
    assert_gradients(head.embedding, rows, projections, rank, size)


class Tied(torch.nn.Module):
    def __init__(self, sparse=False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = sa.nn.VariableWidthEmbedding(plan(), sparse=sparse)
        self.inner = torch.nn.Linear(D, D)
        self.head = sa.nn.VariableWidthHead(self.embedding)

    def forward(self, ids, targets):
        return self.head.loss(self.inner(self.embedding(ids)), targets)


def steps(model, optimizer, batches):
    losses = []
    for ids, targets in batches:
        optimizer.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def batches():
    torch.manual_seed(8)
    return [(torch.randint(41, (4, 6)), torch.randint(41, (4, 6))) for _ in range(4)]


@check
def a_tied_model_in_parallel(rank, size):
    """Some steps of training, with tables over the ranks: the losses and the parameters of one process."""
    for make in (lambda p: torch.optim.SGD(p, 0.5), lambda p: torch.optim.AdamW(p, 0.02)):
        one, ours = Tied(), Tied()
        mesh = init_device_mesh("cpu", (size,))
        parallelize_module(ours, mesh, {"embedding": VocabParallel(), "head": VocabParallel()})
        assert ours.embedding.tables[2].placements == (Shard(0),)
        assert ours.head.embedding is ours.embedding
        right = steps(one, make(one.parameters()), batches())
        torch.testing.assert_close(
            steps(ours, make(ours.parameters()), batches()), right, rtol=1e-4, atol=1e-5
        )
        for a, b in zip(ours.parameters(), one.parameters(), strict=True):
            a = a.full_tensor() if isinstance(a, DTensor) else a
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        hidden = torch.randn(3, D)
        torch.testing.assert_close(ours.head(hidden), one.head(hidden), rtol=1e-3, atol=1e-3)
        assert torch.equal(ours.head.predict(hidden), one.head.predict(hidden))


@check
def dtensors(rank, size):
    """The functions themselves: tokens split and tables whole, tokens whole and tables split, a `Partial` result."""
    mesh = init_device_mesh("cpu", (size,))
    embedding = sa.nn.VariableWidthEmbedding(plan())
    maps = embedding.token_band, embedding.token_row
    ids, hidden = torch.randint(41, (6, 5)), torch.randn(6, 5, D)
    targets = torch.where(torch.rand(6, 5) < 0.3, -100, torch.randint(41, (6, 5)))
    for tokens, rows in (
        (Shard(0), Replicate()),
        (Shard(1), Replicate()),
        (Replicate(), Shard(0)),
        (Replicate(),) * 2,
    ):
        tables = [distribute_tensor(t.detach(), mesh, [rows]).requires_grad_() for t in embedding.tables]
        projections = [
            None if p is None else distribute_tensor(p.detach(), mesh, [Replicate()]).requires_grad_()
            for p in embedding.projection_list()
        ]
        out = sa.variable_width_embedding(distribute_tensor(ids, mesh, [tokens]), tables, projections, *maps)
        assert out.placements == ((Partial(),) if rows == Shard(0) else (tokens,))
        for reduction in ("mean", "sum", "none"):
            own = distribute_tensor(hidden, mesh, [tokens]).requires_grad_()
            spread = distribute_tensor(targets, mesh, [tokens])
            loss = sa.variable_width_cross_entropy(
                own, spread, tables, projections, *maps, reduction=reduction
            )
            one = hidden.clone().requires_grad_()
            embedding.zero_grad()
            right = sa.variable_width_cross_entropy(
                one, targets, list(embedding.tables), embedding.projection_list(), *maps, reduction=reduction
            )
            torch.testing.assert_close(loss.full_tensor(), right, rtol=1e-5, atol=1e-5)
        plain = embedding(ids)
        torch.testing.assert_close(out.full_tensor(), plain)
        (right.sum() + plain.square().sum()).backward()
        (loss.sum().full_tensor() + out.full_tensor().square().sum()).backward()
        torch.testing.assert_close(own.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(tables, embedding.tables, strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(projections, embedding.projection_list(), strict=True):
            if a is not None:
                torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="ids must be a DTensor, as other arguments are"):
        sa.variable_width_embedding(ids, tables, projections, *maps)
    both = [distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in embedding.tables]
    with pytest.raises(ValueError, match="splits both the tokens"):
        sa.variable_width_embedding(distribute_tensor(ids, mesh, [Shard(0)]), both, projections, *maps)


def own_rows(tensor, rank, size):
    return tensor.chunk(size)[rank]


@check
def data_parallel(rank, size):
    from torch.nn.parallel import DistributedDataParallel

    one, ours = Tied(), DistributedDataParallel(Tied())
    for ids, targets in batches():
        one.zero_grad()
        ours.zero_grad()
        one(ids, targets).backward()
        ours(own_rows(ids, rank, size), own_rows(targets, rank, size)).backward()
        for a, b in zip(ours.module.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    sparse = DistributedDataParallel(sa.nn.VariableWidthEmbedding(plan(), sparse=True))
    with pytest.raises(ValueError, match="sparse=True cannot be reduced by DistributedDataParallel"):
        sparse(torch.arange(5))


@check
def fully_sharded(rank, size):
    """FSDP2 of an embedding, a tied head and `head.loss`, each rank with its part of the batch."""
    mesh = init_device_mesh("cpu", (size,))
    one, ours = Tied(), Tied()
    fully_shard(ours, mesh=mesh)
    for ids, targets in batches():
        one.zero_grad()
        ours.zero_grad()
        one(ids, targets).backward()
        ours(own_rows(ids, rank, size), own_rows(targets, rank, size)).backward()
        for a, b in zip(ours.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-5)


@check
def the_planner_knows_the_split(rank, size):
    """What a rank holds, as split_plan says it."""
    embedding = sa.nn.VariableWidthEmbedding(plan())
    rows, projections = split(embedding, rank, size)
    held = sum(t.numel() for t in rows) + sum(p.numel() for p in projections if p is not None)
    assert split_plan(plan(), size)[rank] == held
