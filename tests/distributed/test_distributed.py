"""Two and four processes of gloo: every check of this folder, in one world per size, and what a lost rank does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from distributed import checkpoints, faults, world

# Processes find the tests as this one does, and share two cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(autouse=True)
def _environment_of_processes(monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setenv(checkpoints.PLACE, str(tmp_path / "checkpoint"))


@pytest.mark.slow
@pytest.mark.torch_defaults
def test_every_check(tmp_path):
    """One test for all: each world is made once, and what four ranks read two have written."""
    failed = []
    for size in (2, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        for name, said in world.results(size, folder, world.names()).items():
            failed += [f"{name}, rank {rank} of {size}:\n{text}" for rank, text in enumerate(said) if text]
    assert not failed, "\n".join(failed)
    checkpoints.load_and_compare(1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_rank_that_is_lost_ends_the_others_with_a_message(tmp_path, how):
    began = time.monotonic()
    with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException)) as ended:
        mp.spawn(_alone_to_the_end, (str(tmp_path), how), nprocs=2, join=True)
    assert time.monotonic() - began < 3 * faults.TIMEOUT.total_seconds()
    if how == "raises":
        assert "query must have the 8 positions that the layout gives to rank 1, got 7" in str(ended.value)
    else:
        assert "exit code 3" in str(ended.value)


def _alone_to_the_end(rank: int, folder: str, how: str) -> None:
    faults.run(rank, folder, how)


@pytest.mark.parametrize(("how", "code"), [("dies", 3), ("raises", 1)])
def test_a_lost_rank_is_told_of(tmp_path, how, code):
    """Without anybody who ends the others, as mp.spawn and torchrun do: the collective itself says so."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=faults.run, args=(rank, str(tmp_path), how)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(3 * faults.TIMEOUT.total_seconds())
    assert ranks[0].exitcode == 1
    ranks[1].join()
    assert ranks[1].exitcode == code
    assert Path(tmp_path, "told").read_text()


@pytest.mark.slow
def test_the_training_script_by_its_launcher(tmp_path):
    """torchrun: a run by context, which goes on by tensor; one rank reports."""
    script = Path(__file__).resolve().parents[2] / "examples" / "train_distributed.py"

    def run(*options):
        program = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
            "--length", "32", "--batch", "2", "--top_k", "8", "--window", "2", "--out", str(tmp_path), *options,
        ]  # fmt: skip
        return subprocess.run(program, capture_output=True, text=True, timeout=world.HANG)

    first = run("--context", "2", "--steps", "2", "--every", "2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("step 2/2") == 1
    rest = run("--tensor", "2", "--steps", "3", "--resume")
    assert rest.returncode == 0, rest.stderr
    assert "step 3/3" in rest.stdout
    assert "step 2/3" not in rest.stdout
    wrong = run("--context", "3")
    assert "must make the 2 processes" in wrong.stderr
