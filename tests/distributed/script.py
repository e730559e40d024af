"""The training script: equal losses for every mesh, and a run that goes on where it was left, on another mesh."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from distributed.checkpoints import PLACE
from distributed.world import check
from sparse_attn.demo.text import load

MESHES = {2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (1, 2, 2), (2, 1, 2)]}


def script() -> dict:
    return runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "train_distributed.py"))


@check
def equal_losses(rank, size):
    example = script()
    settings = example["Settings"](steps=4, batch=4, length=48, top_k=8, window=2)
    corpus = load(None, settings.length)
    right = torch.tensor(example["train"](corpus, settings, None, quiet=True))
    assert right[-1] < right[0]
    for shape in MESHES[size]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=example["AXES"])
        losses = torch.tensor(example["train"](corpus, settings, mesh, quiet=True))
        torch.testing.assert_close(losses, right, rtol=1e-3, atol=1e-3, msg=f"{shape}: {losses} for {right}")
    out = str(Path(os.environ[PLACE], f"run-{size}"))
    mesh = init_device_mesh("cpu", MESHES[size][0], mesh_dim_names=example["AXES"])
    half = settings._replace(steps=2, out=out, every=2)
    example["train"](corpus, half, mesh, quiet=True)
    mesh = init_device_mesh("cpu", MESHES[size][-1], mesh_dim_names=example["AXES"])
    rest = torch.tensor(example["train"](corpus, settings._replace(out=out, resume=True), mesh, quiet=True))
    torch.testing.assert_close(rest, right[2:], rtol=1e-3, atol=1e-3)
