"""Peak memory of a piece of a program."""

import pytest
import torch

from sparse_attn.demo.memory import PeakMemory


def test_peak_memory_sees_what_was_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    if memory.peak() is None:
        pytest.skip("this system has no high-water mark that can be set back")
    torch.ones(50_000_000)  # 200 MB
    assert 150e6 < memory.peak() < 400e6
    assert PeakMemory(torch.device("cpu")).peak() < 100e6
