"""One spawn per world size: processes of gloo that run every check of this folder, one after another.

A check is a function of (rank, size) in a module of this folder, marked with @check. All ranks run it; what a rank
raises is the check's result, and the ranks meet after each, so that a failure of one does not shift the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
HANG = int(os.environ.get("HANG", "900"))  # seconds of a whole world, also on a machine with other work
MODULES = (
    "dtensors",
    "context",
    "context_numbers",
    "context_packed",
    "context_traffic",
    "inside",
    "tensor",
    "vocabulary",
    "checkpoints",
    "script",
)
_checks: dict[str, Callable[[int, int], None]] = {}


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    _checks[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = function
    return function


def names() -> list[str]:
    for module in MODULES:
        import_module(f"distributed.{module}")
    return list(_checks)


def run(rank: int, size: int, folder: str, chosen: list[str]) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANG, exit=True)  # with the place where each thread stands
    names()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    for name in chosen:
        torch.manual_seed(0)
        said = ""
        try:
            _checks[name](rank, size)
        except (Exception, pytest.fail.Exception):
            said = traceback.format_exc(limit=-6)
        Path(folder, f"{name}.{rank}").write_text(said)
        every = torch.tensor([bool(said)])
        try:
            dist.all_reduce(every, dist.ReduceOp.MAX)
        except RuntimeError:
            break
        if every and os.environ.get("SPARSE_ATTN_FIRST"):
            break
    dist.destroy_process_group()
    # Without Python's own end, in which threads of gloo that belong to lost subgroups may wait for each other.
    sys.stdout.flush()
    os._exit(0)


def results(size: int, folder: Path, chosen: list[str]) -> dict[str, list[str]]:
    """What each check said on each rank: empty where it passed."""
    mp.spawn(run, (size, str(folder), chosen), nprocs=size, join=True)
    found = {}
    for name in chosen:
        files = [folder / f"{name}.{rank}" for rank in range(size)]
        found[name] = [f.read_text() if f.exists() else "did not run" for f in files]
    return found


if __name__ == "__main__":  # python -m distributed.world SIZE [words]: those checks alone, from tests/
    import tempfile

    words = sys.argv[2:]
    mine = [n for n in import_module("distributed.world").names() if not words or any(w in n for w in words)]
    with tempfile.TemporaryDirectory() as place:
        for name, said in (
            import_module("distributed.world").results(int(sys.argv[1]), Path(place), mine).items()
        ):
            bad = [f"rank {r}: {s}" for r, s in enumerate(said) if s]
            print(name, "ok" if not bad else "FAILED\n" + "\n".join(bad))
