"""Modules under torch's own wrappers, in a world of one process: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from sparse_attn import WidthPlan
from sparse_attn.nn import VariableWidthEmbedding, VariableWidthHead

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

PLAN = WidthPlan.from_cutoffs(60, 16, cutoffs=[10], widths=[16, 4])
IDS = torch.arange(5, 25)


@pytest.fixture(autouse=True, scope="module")
def _world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(module: torch.nn.Module, **options) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)), **options)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = VariableWidthEmbedding(PLAN)
        self.inner = torch.nn.Linear(16, 16)
        self.head = VariableWidthHead(self.embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head.loss(self.inner(self.embedding(ids)), ids)


def assert_equal_gradients(sharded: torch.nn.Module, plain: torch.nn.Module) -> None:
    for ours, right in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), right.grad)


def test_every_method_of_a_sharded_head():
    head, hidden = VariableWidthHead.from_plan(PLAN), torch.randn(20, 16)
    plain = copy.deepcopy(head)
    shard(head)
    for method in ("loss", "log_prob", "predict", "topk", "__call__"):
        more = {"loss": (IDS,), "topk": (3,)}.get(method, ())
        ours, right = (getattr(h, method)(hidden, *more) for h in (head, plain))
        torch.testing.assert_close(ours, right, msg=method)
        if method == "loss":
            ours.backward()
            right.backward()
            assert_equal_gradients(head, plain)


@pytest.mark.parametrize("how", ["one group", "a group of its own, kept whole"])
def test_a_sharded_model_with_a_tied_head(how):
    model = Tied()
    plain = copy.deepcopy(model)
    if how != "one group":
        shard(model.embedding, reshard_after_forward=False)
    shard(model)
    loss, right = model(IDS), plain(IDS)
    assert torch.equal(loss, right)
    loss.backward()
    right.backward()
    assert_equal_gradients(model, plain)


def test_a_tied_head_whose_tables_are_sharded_again_says_what_to_do():
    model = Tied()
    shard(model.embedding)
    shard(model)
    with pytest.raises(TypeError, match="shard the embedding with reshard_after_forward=False"):
        model(IDS)


def test_a_model_that_is_sharded_on_the_meta_device():
    with torch.device("meta"):
        model = Tied()
    shard(model).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(model.embedding.token_band, PLAN.token_band)
    assert torch.equal(model.embedding.token_row, PLAN.token_row)
    model(IDS).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_data_parallel():
    embedding = VariableWidthEmbedding(PLAN)
    plain = copy.deepcopy(embedding)
    torch.nn.parallel.DistributedDataParallel(embedding)(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    for ours, right in zip(embedding.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, right.grad)


def test_sparse_gradients_are_refused_under_data_parallel_alone():
    embedding = VariableWidthEmbedding(PLAN, sparse=True)
    wrapped = torch.nn.parallel.DistributedDataParallel(embedding)
    with pytest.raises(ValueError, match="sparse=True cannot be reduced by DistributedDataParallel"):
        wrapped(IDS)
    with torch.no_grad():
        assert wrapped(IDS).shape == (20, 16)
    embedding(IDS).sum().backward()
    assert embedding.tables[1].grad.is_sparse
