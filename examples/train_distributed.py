"""Trains the demo's model on several processes: a mesh of data × context × tensor.

    torchrun --nproc-per-node 4 examples/train_distributed.py --data 1 --context 2 --tensor 2
    torchrun --nproc-per-node 4 examples/train_distributed.py --context 4 --length 4096 --out run
    torchrun --nproc-per-node 2 examples/train_distributed.py --tensor 2 --length 4096 --out run --resume

Data: each rank has some of the batch. Context: each has some of the positions, load-balanced (zigzag); attention
selects among all of them. Tensor: each has some of the heads, of the MLP and of the vocabulary. The losses are those of
one process (`python examples/train_distributed.py`) on the same text, whatever the mesh. The text is State of the Union
addresses, or --text FILE. With GPUs the backend is NCCL, else gloo.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparse_attn.demo.model import GPT, WIDTH
from sparse_attn.demo.text import Corpus, load, windows
from sparse_attn.distributed import Layout, VocabParallel, context_parallel, tensor_parallel
from sparse_attn.planner import plan_widths

AXES = ("data", "context", "tensor")


class Settings(NamedTuple):
    steps: int = 100
    batch: int = 8  # of all ranks together
    length: int = 256
    top_k: int = 32
    window: int = 8
    rate: float = 3e-3
    seed: int = 0
    out: str | None = None  # a folder for checkpoints
    every: int = 50  # steps between two
    resume: bool = False


class Place:
    """Where this process stands in the mesh; without one it is alone."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh
        self.size = {axis: 1 if mesh is None else mesh[axis].size() for axis in AXES}
        self.rank = {axis: 0 if mesh is None else mesh[axis].get_local_rank() for axis in AXES}

    def sum(self, tensor: Tensor) -> None:
        """Over the ranks that have other tokens, in place."""
        for axis in ("data", "context"):
            if self.size[axis] > 1:
                assert self.mesh is not None
                dist.all_reduce(tensor, group=self.mesh[axis].get_group())


def build(corpus: Corpus, settings: Settings, place: Place, device: torch.device) -> GPT:
    torch.manual_seed(settings.seed)  # the same weights everywhere, before they are split
    plan = plan_widths(torch.bincount(corpus.train, minlength=len(corpus.alphabet)), WIDTH, ratio=0.5)
    model = GPT(len(corpus.alphabet), settings.length, settings.top_k, settings.window, plan).to(device)
    if place.size["tensor"] > 1:
        mesh = place.mesh["tensor"]
        tensor_parallel(model, mesh)
        mlps = {"blocks.*.mlp.0": ColwiseParallel(), "blocks.*.mlp.2": RowwiseParallel()}
        parallelize_module(model, mesh, {**mlps, "embedding": VocabParallel(), "head": VocabParallel()})
    return model


def loss_of(model: GPT, ids: Tensor, targets: Tensor, place: Place, layout: Layout) -> Tensor:
    """Of this rank's tokens, its share of the mean over all: ids and targets [B, T] of the whole batch."""
    count = targets.numel()
    ids, targets = (t.chunk(place.size["data"])[place.rank["data"]] for t in (ids, targets))
    here = place.rank["context"]
    ids, targets = (layout.local(t, here, 1) for t in (ids, targets))
    stream = model.embedding(ids) + model.positions[layout.positions(here, ids.device)]
    for block in model.blocks:
        stream = block(stream)
    return model.head.loss(model.norm(stream), targets, reduction="sum") / count


def train(
    corpus: Corpus, settings: Settings, mesh: DeviceMesh | None = None, quiet: bool = False
) -> list[float]:
    """The loss of each step that this call makes."""
    place = Place(mesh)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    model = build(corpus, settings, place, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
    layout = Layout.zigzag(settings.length, place.size["context"])
    first = restore(model, optimizer, settings) if settings.resume else 0
    starts = corpus.train_starts(settings.steps, settings.batch, settings.length, settings.seed)
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1.0, (step + 1) / 10)
        ids, targets = windows(corpus.train, starts[step], settings.length, device)
        optimizer.zero_grad()
        over_ranks = nullcontext()
        if place.size["context"] > 1:
            over_ranks = context_parallel(layout, place.mesh["context"].get_group())
        with over_ranks:
            loss = loss_of(model, ids, targets, place, layout)
            loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                place.sum(grad.to_local() if hasattr(grad, "placements") else grad)
        optimizer.step()
        total = loss.detach().clone()
        place.sum(total)
        losses.append(total.item())
        if not quiet:
            done = (step + 1 - first) * targets.numel() / (time.perf_counter() - began)
            print(
                f"\rstep {step + 1}/{settings.steps}  loss {losses[-1]:.4f}  {done:,.0f} tokens/s",
                end="",
                flush=True,
            )
        if settings.out and ((step + 1) % settings.every == 0 or step + 1 == settings.steps):
            keep(model, optimizer, step + 1, settings)
    if not quiet:
        print()
    return losses


def keep(model: GPT, optimizer: torch.optim.Optimizer, step: int, settings: Settings) -> None:
    """A checkpoint that any mesh can read; its folder is named only when it is whole."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    folder = Path(settings.out, f"step-{step:06d}")
    dcp.save(states, checkpoint_id=folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(settings.out, "latest").write_text(folder.name)
    if dist.is_initialized():
        dist.barrier()


def restore(model: GPT, optimizer: torch.optim.Optimizer, settings: Settings) -> int:
    """The steps that are done."""
    latest = Path(settings.out or ".", "latest")
    if settings.out is None or not latest.exists():
        raise SystemExit(f"--resume needs --out with a checkpoint, and there is no {latest}")
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=latest.parent / latest.read_text())
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return int(latest.read_text().removeprefix("step-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis in AXES:
        parser.add_argument(
            f"--{axis}", type=int, help=f"ranks of the mesh's {axis} axis (data: what is left)"
        )
    for name, default in Settings()._asdict().items():
        if name == "resume":
            parser.add_argument(
                "--resume", action="store_true", help="go on from the latest checkpoint in --out"
            )
        else:
            parser.add_argument(
                f"--{name}", type=type(default) if default is not None else str, default=default
            )
    parser.add_argument("--text", help="a UTF-8 file to learn instead of the one that comes with the package")
    arguments = vars(parser.parse_args())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shape = [arguments.pop(axis) for axis in AXES]
    inner = (shape[1] or 1) * (shape[2] or 1)
    shape = [shape[0] or max(1, world // inner), shape[1] or 1, shape[2] or 1]
    if shape[0] * inner != world:
        parser.error(
            f"data × context × tensor = {shape} must make the {world} processes (torchrun --nproc-per-node)"
        )
    corpus = load(arguments.pop("text"), arguments["length"])
    settings = Settings(**arguments)
    if settings.batch % shape[0]:
        parser.error(f"--batch {settings.batch} must be a multiple of the {shape[0]} ranks that share it")
    mesh = None
    if world > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        mesh = init_device_mesh("cuda" if cuda else "cpu", tuple(shape), mesh_dim_names=AXES)
    train(corpus, settings, mesh, quiet=int(os.environ.get("RANK", "0")) != 0)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
