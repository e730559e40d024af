"""Memory beyond inputs and outputs grows with T, not with T²."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from helpers.inputs import qkv

import sparse_attn.wings.reference.chunks

MIB = 2**20
PEAK = Path("/proc/self/clear_refs")


def peak_beyond(device: str, call) -> int:
    """Bytes by which `call` at its worst moment passes what stands before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    PEAK.write_text("5")  # sets the process's peak back to what it holds now
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.fixture
def _chunked_reference(monkeypatch):
    """Small chunks of the reference, so that its bound shows at lengths that a test can afford."""
    monkeypatch.setattr(sparse_attn.wings.reference.chunks, "_ELEMENTS", 1 << 18)


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.usefixtures("_chunked_reference")
@pytest.mark.parametrize("share", ["none", "kv"])
@pytest.mark.parametrize("backward", [False, True])
def test_peak_grows_with_the_length(wing, backward, share):
    if wing.device not in ("cpu", "cuda"):
        pytest.skip(f"no way to read the peak on {wing.device}")
    if wing.name == "reference" and not backward:
        pytest.skip("its forward is the same with a gradient, and its peak is looked at there")

    def peak(length: int) -> int:
        inputs = [t.to(wing.device).requires_grad_(backward) for t in qkv(1, 4, 2, length, length, 16)]
        options = {"is_causal": True, "share": share, "backend": wing.name}

        def call():
            out = sparse_attn.topk_attention(*inputs, 8, **options)
            if backward:
                out.sum().backward()

        return peak_beyond(wing.device, call)

    peak(256)  # threads, libraries and their buffers
    short, long = peak(1536), peak(3072)
    matrix = 4 * 3072 * 3072 * 4  # four heads of float32 scores: 144 MiB
    assert long < matrix / 4, f"{long / MIB:.0f} MiB beside a score matrix of {matrix / MIB:.0f} MiB"
    # Twice the length: twice the memory, with room for what is constant and for the allocator.
    assert long < 2 * short + 12 * MIB, f"{short / MIB:.1f} MiB at 1536, {long / MIB:.1f} MiB at 3072"


def test_a_wing_holds_nothing_after_the_call(wing):
    """No cache that grows: the same call a hundred times leaves the process as large as it was."""
    if wing.device != "cpu" or not PEAK.exists():
        pytest.skip(f"no way to read the memory of {wing.device}")
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 256, 256, 32)]
    call = lambda: wing.topk_attention(*inputs, 16, is_causal=True).sum().backward()  # noqa: E731
    for _ in range(10):
        call()
    before = resident("VmRSS")
    for _ in range(100):
        call()
    assert resident("VmRSS") - before < 8 * MIB
