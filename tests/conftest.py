"""What every test runs under: poisoned memory, two threads, one seed, and once per wing of this machine.

A test that takes `wing` runs for every wing that is registered (see helpers/wings.py); one that takes `dtype`
too runs for every dtype of that wing, unless it is parametrized with some. A module that has WINGS runs over those
instead. The reference, one program for all dtypes, takes them in turn where a test has other parameters: each
set of these meets one dtype.
A wing that cannot run here is skipped with its own reason, except that
SPARSE_ATTN_REQUIRE_EXT=1 makes the missing extension a failure (wings/test_base.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is loaded. Deterministic mode, which poisons memory below, needs the first of cuBLAS; the second
# keeps idle threads from spinning, which on a busy machine costs more than the tests themselves.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from helpers.interpreter import hasten
from helpers.wings import wings_under_test

from sparse_attn.wings import triton as triton_wing

if triton_wing.interpreted and triton_wing.version is not None:
    hasten()

# Inductor takes what it finds in its cache for this CPU's, also what was compiled for other instructions (a network
# home, ATEN_CPU_CAPABILITY): wrong results and crashes. So one folder per instruction set, and nobody else's.
ROOT = Path(__file__).resolve().parent.parent
CAPABILITY = "".join(c for c in torch.backends.cpu.get_cpu_capability().lower() if c.isalnum())
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor" / CAPABILITY))

THREADS = 2
LONGEST = ("test_interpreted", "test_ahead_of_time", "test_instruction_sets", "test_gpu_check")


def _skip_if_missing(wing) -> list:
    return [pytest.mark.skip(reason=wing.missing)] if wing.missing else []


def _in_turn(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """All but those of the reference whose dtype is not its turn."""
    counts: dict[tuple, int] = {}  # of a test: the sets of other parameters so far
    turns: dict[tuple, int] = {}
    for item in items:
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        wing, dtype = given.pop("wing", None), given.pop("dtype", None)
        chosen = any("dtype" in mark.args[0] for mark in item.iter_markers("parametrize"))
        if getattr(wing, "name", None) != "reference" or dtype is None or chosen or not given:
            yield item
            continue
        test = item.path, item.originalname
        others = *test, item.name.replace(f"{wing}-{str(dtype).removeprefix('torch.')}", "", 1)
        turns.setdefault(others, counts.get(test, 0))
        counts[test] = max(counts.get(test, 0), turns[others] + 1)
        marker = item.get_closest_marker("dtypes")
        dtypes = [d for d in wing.dtypes if marker is None or d in marker.args]
        if dtypes[turns[others] % len(dtypes)] == dtype:
            yield item


def _longest_first(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """What takes minutes begins the share of each process (pytest-xdist deals the list out in pieces), so that none
    is left alone with it at the end."""
    longest = [item for item in items if item.path.name.startswith(LONGEST)]
    longest.sort(
        key=lambda item: next(n for n, name in enumerate(LONGEST) if item.path.name.startswith(name))
    )
    others = [item for item in items if not item.path.name.startswith(LONGEST)]
    found: list[pytest.Item] = []
    for number in range(processes):
        first, size = longest[number::processes], (len(items) - len(found)) // (processes - number)
        rest = max(0, size - len(first))
        found += first + others[:rest]
        del others[:rest]
    return found + others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("[" in argument for argument in config.args):  # one that was asked for by name
        items[:] = _in_turn(items)
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        items[:] = _longest_first(items, processes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "wing" not in metafunc.fixturenames:
        return
    wings = getattr(metafunc.module, "WINGS", None) or wings_under_test()
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = {name for names in own for name in (names.split(",") if isinstance(names, str) else names)}
    if "dtype" not in metafunc.fixturenames or "dtype" in own:
        cases = [pytest.param(w, id=str(w), marks=_skip_if_missing(w)) for w in wings]
        metafunc.parametrize("wing", cases)
        return
    marker = metafunc.definition.get_closest_marker("dtypes")
    cases = [
        pytest.param(w, d, id=f"{w}-{str(d).removeprefix('torch.')}", marks=_skip_if_missing(w))
        for w in wings
        for d in w.dtypes
        if marker is None or d in marker.args
    ]
    metafunc.parametrize(("wing", "dtype"), cases)


def _poison(on: bool) -> None:
    """Fills whatever torch allocates without a value, in Python and C++, with NaN or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = on
    # As torch.use_deterministic_algorithms, which also loads all of Inductor, in every process that tests anything.
    torch._C._set_deterministic_algorithms(on, warn_only=True)


@pytest.fixture(autouse=True)
def _environment(request: pytest.FixtureRequest):
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    _poison(request.node.get_closest_marker("torch_defaults") is None)
    yield
    _poison(False)
    torch.set_num_threads(threads)
