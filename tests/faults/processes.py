"""More than one process, and tensors that stand for shards: a world of one process of gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

import sparse_attn as sa
from faults import case, off_by, refused


@contextmanager
def _world() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _plan() -> sa.WidthPlan:
    return sa.WidthPlan.from_cutoffs(60, 16, cutoffs=[10], widths=[16, 4])


def _ours(error: Exception) -> str:
    text = " ".join(str(error).split())
    assert isinstance(error, (ValueError, TypeError)), (
        f"{type(error).__name__}: {text}"
    )  # torch's are neither
    return f"refused: {type(error).__name__}, “{text[:150]}{'…' if len(text) > 150 else ''}”"


@case("DistributedDataParallel with `sparse=True`", "“Cannot access storage of SparseTensorImpl”")
def ddp_with_sparse_gradients() -> str:
    torch.manual_seed(0)
    embedding, ids = sa.nn.VariableWidthEmbedding(_plan(), sparse=True), torch.arange(5, 25)
    (right,) = torch.autograd.grad(embedding(ids).sum(), [embedding.tables[1]])
    with _world():
        try:
            torch.nn.parallel.DistributedDataParallel(embedding)(ids).sum().backward()
        except Exception as error:
            return _ours(error)
    return "the gradient " + off_by(embedding.tables[1].grad.to_dense(), right.to_dense(), 1e-6)


@case("FSDP2: `fully_shard(head)`, then `head.loss`", "“mixed torch.Tensor and DTensor”")
def fsdp_of_a_head() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    head, hidden, targets = sa.nn.VariableWidthHead.from_plan(_plan()), torch.randn(3, 16), torch.arange(3)
    right = head.loss(hidden, targets).detach()
    with _world():
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
        try:
            loss = head.loss(hidden, targets)
        except Exception as error:
            return _ours(error)
        loss.backward()
    return "the loss " + off_by(loss.detach(), right, 1e-6)


@case("DTensor inputs", "“no sharding strategy registered”")
def distributed_tensors() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 12, 8).unbind(0)
    with _world():
        mesh, found = init_device_mesh("cpu", (1,)), []
        for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
            parts = (distribute_tensor(t, mesh, [placement]) for t in (q, k, v))
            try:
                out = sa.topk_attention(*parts, 4, is_causal=True).full_tensor()
            except Exception as error:
                found.append(_ours(error))
            else:
                found.append(off_by(out, sa.topk_attention(q, k, v, 4, is_causal=True), 1e-6))
    return "; ".join(dict.fromkeys(found))


@case("torch's `context_parallel` around topk_attention", "attended inside its own shard, off by 2.63")
def context_parallel() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
    with _world():
        mesh = init_device_mesh("cpu", (1,))
        with context_parallel(mesh, buffers=(q, k, v), buffer_seq_dims=(2, 2, 2)):
            return refused(lambda: sa.topk_attention(q, k, v, 4, is_causal=True), "context_parallel")


@case(
    'tensor parallel with `share="all"`: a rank has some of the heads', "its own choice, logits off by 0.256"
)
def tensor_parallel_with_one_selection() -> str:
    from faults.huggingface import _configure, _ids, _llama, _logits

    model, ids = _configure(_llama(), top_k=4, share="all"), _ids(1, 24)
    for layer in model.model.layers:  # as the first of two ranks has them
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, name)
            linear.weight = torch.nn.Parameter(linear.weight[: len(linear.weight) // 2])
        attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :24])
    with _world():
        return refused(lambda: _logits(model, ids), "share='all'", "tensor parallelism")
