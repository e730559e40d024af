"""Checkpoints of torch.distributed: written by two ranks, read by one and by four."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import sparse_attn as sa
from distributed.world import check
from sparse_attn.distributed import VocabParallel, tensor_parallel

PLACE = "SPARSE_ATTN_TEST_CHECKPOINT"  # a folder that the worlds share
D = 16


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        plan = sa.WidthPlan.from_cutoffs(37, D, cutoffs=[5, 12], widths=[D, 6, 3])
        self.embedding = sa.nn.VariableWidthEmbedding(plan)
        self.attention = sa.nn.TopKAttention(D, 4, 4, share="all", sink_logits=True)
        self.head = sa.nn.VariableWidthHead(self.embedding)

    def forward(self, ids):
        return self.head.loss(self.attention(self.embedding(ids[:, :-1])), ids[:, 1:])


def parallel(size: int) -> Model:
    model = Model()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        tensor_parallel(model, mesh)
        parallelize_module(model, mesh, {"embedding": VocabParallel(), "head": VocabParallel()})
    return model


def step(model, optimizer) -> torch.Tensor:
    torch.manual_seed(5)
    optimizer.zero_grad()
    loss = model(torch.randint(37, (2, 20)))
    loss.backward()
    optimizer.step()
    return loss.detach()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), 0.05)


def load_and_compare(size: int) -> None:
    place = Path(os.environ[PLACE])
    torch.manual_seed(99)
    model = parallel(size)
    optimizer = optimizer_of(model)
    states = get_state_dict(model, optimizer)
    state = dict(zip(("model", "optimizer"), states, strict=True))
    dcp.load(state, checkpoint_id=place / "states")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    right = torch.load(place / "losses.pt")
    torch.testing.assert_close(
        torch.stack([step(model, optimizer) for _ in right]), right, rtol=1e-4, atol=1e-5
    )


@check
def write_and_read(rank, size):
    place = Path(os.environ[PLACE])
    if size == 2:
        torch.manual_seed(1)
        model = parallel(size)
        optimizer = optimizer_of(model)
        step(model, optimizer)
        states = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=place / "states")
        losses = torch.stack([step(model, optimizer) for _ in range(3)])
        if rank == 0:
            torch.save(losses, place / "losses.pt")
        dist.barrier()
    load_and_compare(size)
