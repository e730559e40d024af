"""Autotuning, with a timer that is made up: when it times, what it takes, and what it remembers."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_attn.wings import triton as triton_wing

if triton_wing.version is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from sparse_attn.triton_kernels.lib import tuning

CPU = torch.device("cpu")
CONFIGS = [{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}]
SECONDS = {16: 3.0, 32: 1.0, 64: 2.0}

pytestmark = pytest.mark.torch_defaults  # deterministic mode turns tuning off


class Kernel:
    """What a launch does here: it names its configuration. `timed` has those that were timed."""

    def __init__(self, monkeypatch, seconds=SECONDS):
        self.timed, self.seconds = [], seconds
        monkeypatch.setattr(tuning, "measure", self.measure)

    def measure(self, run, device) -> float:
        block = run()
        self.timed.append(block)
        return self.seconds[block]

    def __call__(self, shape=(torch.bfloat16, 128), **options) -> int:
        return tuning.run_tuned("a kernel", shape, CONFIGS, lambda c: c["BLOCK"], CPU, **options)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_winners", None)


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")


@pytest.mark.parametrize("value", [None, "0", ""])
def test_the_first_is_taken_unasked(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv(tuning.VARIABLE, value)
    kernel = Kernel(monkeypatch)
    assert kernel() == 16
    assert kernel.timed == []
    assert not tuning.cache_file().exists()


def test_the_fastest_is_taken_and_kept(asked, monkeypatch):
    kernel = Kernel(monkeypatch)
    assert kernel() == 32
    assert kernel.timed == [16, 32, 64]
    assert kernel() == 32
    assert kernel((torch.float16, 128)) == 32, "another class"
    assert kernel.timed == [16, 32, 64] * 2


def test_a_later_process_times_nothing(asked, monkeypatch):
    assert Kernel(monkeypatch)() == 32
    (key,) = json.loads(tuning.cache_file().read_text())
    assert all(part in key for part in ("interpreter", "triton", "a kernel", "bfloat16 128")), key
    monkeypatch.setattr(tuning, "_winners", None)
    later = Kernel(monkeypatch, {16: 1.0, 32: 2.0, 64: 3.0})
    assert later() == 32
    assert later.timed == []


def test_processes_that_write_at_once_keep_each_other(asked, monkeypatch):
    kernel = Kernel(monkeypatch)
    kernel()
    known = json.loads(tuning.cache_file().read_text())
    tuning.cache_file().write_text(json.dumps(known | {"of another process": "x"}))
    kernel((torch.float16, 64))
    assert len(json.loads(tuning.cache_file().read_text())) == 3


def test_a_configuration_that_is_no_more(asked, monkeypatch):
    """What an older version of the package found fastest."""
    Kernel(monkeypatch)()
    (key,) = json.loads(tuning.cache_file().read_text())
    tuning.cache_file().write_text(json.dumps({key: "{'BLOCK': 8}"}))
    monkeypatch.setattr(tuning, "_winners", None)
    kernel = Kernel(monkeypatch)
    assert kernel() == 32
    assert kernel.timed == [16, 32, 64]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", "[" * 100_000, " " * tuning.LARGEST + "{}"])
def test_a_broken_file_is_no_file(asked, monkeypatch, text):
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_bytes(text.encode(errors="surrogateescape"))
    assert Kernel(monkeypatch)() == 32


def test_an_interrupted_write_leaves_the_old_file_and_no_other(asked, monkeypatch):
    Kernel(monkeypatch)()
    before = tuning.cache_file().read_text()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tuning._remember("another", "{}")
    assert tuning.cache_file().read_text() == before
    assert list(tuning.cache_file().parent.iterdir()) == [tuning.cache_file()]


def test_a_folder_that_cannot_be_written(asked, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    kernel = Kernel(monkeypatch)
    assert kernel() == kernel() == 32
    assert kernel.timed == [16, 32, 64], "this process remembers"


def test_noise_changes_nothing(asked, monkeypatch):
    assert Kernel(monkeypatch, {16: 1.0, 32: 0.99, 64: 2.0})() == 16


def test_what_does_not_fit_is_left_out(asked, monkeypatch):
    def run(config):
        if config["BLOCK"] == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return config["BLOCK"]

    kernel = Kernel(monkeypatch)
    assert tuning.run_tuned("a kernel", (), CONFIGS, run, CPU) == 64
    assert kernel.timed == [16, 64]


def test_deterministic_mode_wins(asked, monkeypatch):
    kernel = Kernel(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert kernel() == 16
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel.timed == []


def test_nothing_is_timed_that_adds(asked, monkeypatch):
    """But what is known is taken."""
    kernel = Kernel(monkeypatch)
    assert kernel(repeatable=False) == 16
    assert kernel() == 32
    assert kernel(repeatable=False) == 32
    assert kernel.timed == [16, 32, 64]


@pytest.mark.parametrize("compiling", [True, False])
def test_nothing_is_timed_inside_of_a_graph(asked, monkeypatch, compiling):
    kernel = Kernel(monkeypatch)
    state = {"busy": True}
    if compiling:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state["busy"])
    else:
        monkeypatch.setattr(torch, "get_device_module", lambda device: Capturing(state))
    device = CPU if compiling else torch.device("cuda")
    results = []
    for state["busy"] in (True, False, True):
        results.append(tuning.run_tuned("a kernel", (), CONFIGS, lambda c: c["BLOCK"], device))
    assert results == [16, 32, 32]
    assert kernel.timed == [16, 32, 64]


class Capturing:
    """The part of torch.cuda that is asked."""

    def __init__(self, state):
        self.is_current_stream_capturing = lambda: state["busy"]

    @staticmethod
    def get_device_name(device):
        return "a device"


def test_the_timer_measures():
    import time

    assert 0.005 < tuning.measure(lambda: time.sleep(0.01), CPU) < 1


def test_classes_of_sizes():
    assert [tuning.size_class(n) for n in (0, 1, 3, 1024, 1025)] == [1, 1, 4, 1024, 2048]
    assert tuning.distinct([(1, 2), (3, 4), (1, 2)]) == [(1, 2), (3, 4)]


def test_scratch_memory_of_a_large_budget(monkeypatch):
    """A budget of a million keys would take 35 GB with as many programs as an H100 holds."""
    from sparse_attn.triton_kernels import topk_select

    monkeypatch.setattr(topk_select, "INTERPRETED", False)
    for budget, programs in ((64, 264), (4096, 264), (1 << 20, 3)):
        (c, *_) = topk_select.configs(2, 128, budget, amd=False, heavy=False, rows=1 << 14)
        assert topk_select._programs(132, c) == programs
        assert 8 * programs * c.block_m * (c.capacity + c.block_n) <= topk_select.SCRATCH_BYTES


def test_rows_that_are_far_apart_are_copied():
    """Offsets within a row are 32 bits in kernels."""
    from sparse_attn.triton_kernels.lib.common import near_rows

    table = torch.empty(1 << 20, 4096, device="meta")
    assert near_rows(table) is table
    far = torch.empty(4096, 1 << 20, device="meta").t()  # a column every 2^20 elements
    assert near_rows(far).stride() == (4096, 1)
