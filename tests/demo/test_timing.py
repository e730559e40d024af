"""The demo's timing: right, within its time, and plain about what it leaves out."""

import time

import pytest
import torch

from sparse_attn.demo import timing

CPU = torch.device("cpu")


@pytest.fixture
def pace(monkeypatch):
    """Seconds that a call of each contender seems to take at T=32, without taking them."""
    seconds = {"SDPA": 1e-3, "top-k": 1e-3, "plain PyTorch": 1e-3}
    monkeypatch.setattr(
        timing, "_probe", lambda *what: {name: (32, value) for name, value in seconds.items()}
    )
    return seconds


def measure(lengths: list[int], seconds: float) -> timing.Timing:
    found = timing.start(8, CPU)
    assert list(timing.measure(found, lengths, CPU, 0, seconds)) == lengths
    return found


def test_plain_topk_attention_with_all_keys_is_dense_attention():
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(timing.plain_topk_attention(query, key, value, 24), dense)


def test_everything_that_fits_is_timed():
    found = measure([16, 32, 64], 10.0)
    assert all(all(row.values()) for row in found.seconds.values())
    assert not found.skipped


def test_what_would_take_too_long_is_left_out_with_its_reason(pace):
    pace["plain PyTorch"] = 3.0
    found = measure([32, 64], 5.0)
    for length in (32, 64):
        assert found.seconds[length]["plain PyTorch"] is None
        assert found.seconds[length]["SDPA"] > 0
        assert found.seconds[length]["top-k"] > 0
    assert found.skipped["plain PyTorch at T=32"].startswith("a call would take about 3.0 s, and ")
    assert len(found.skipped) == 2


def test_a_length_that_does_not_fit_takes_nothing_from_those_that_do(pace):
    found = measure([32, 65536], 1.0)
    assert all(found.seconds[32].values())
    assert not any(found.seconds[65536].values())
    assert len(found.skipped) == 3


def test_what_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "TOO_BIG", 4 * timing.HEADS * 32 * 32)
    found = measure([32, 64], 10.0)
    assert found.seconds[32]["plain PyTorch"] > 0
    assert found.seconds[64]["plain PyTorch"] is None
    assert "score matrix" in found.skipped["plain PyTorch at T=64"]


def test_many_rounds_end_with_the_time(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 10**6)
    began = time.perf_counter()
    measure([64, 128], 1.0)
    assert time.perf_counter() - began < 10
