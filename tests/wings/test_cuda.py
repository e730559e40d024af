"""The CUDA wing among the others: when it is taken, when not and why; and its host side as far as no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import gpu_code

from sparse_attn.wings import base, extension
from sparse_attn.wings import cuda as cuda_wing
from sparse_attn.wings import triton as triton_wing

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc").glob("cuda/*.cpp"))
OPS = tuple(op for f in SOURCES for op in re.findall(r'm\.impl\("(\w+)\.cuda"', f.read_text()))
needs_sources = pytest.mark.skipif(not SOURCES, reason="no source checkout")


@pytest.fixture
def built(monkeypatch):
    """As with an extension that has the kernels, and a GPU of capability 9.0."""
    info = {"cuda": "13.0", "no_cuda": "", "cuda_archs": ["80", "90a"]}
    for op in OPS:
        monkeypatch.setitem(cuda_wing.CUDA_WING.implementations, op, None)
    monkeypatch.setattr(extension, "load_error", None)
    monkeypatch.setattr(extension, "module", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return info


def why_not(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **sizes) -> str | None:
    return base.reasons("gathered_attention", torch.device(device), dtype, **sizes)["cuda"]


@needs_sources
def test_which_of_the_gpu_wings_goes_first(built, monkeypatch):
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert len(OPS) >= 6
    sizes = {"head_dim": 256, "value_dim": 256}
    monkeypatch.setattr(triton_wing, "version", (3, 6))
    for op in OPS:
        first = "triton" if op in ("topk_select", "topk_attention") else "cuda"
        assert base.choose(op, tensor, None, sizes=sizes) == first
    monkeypatch.setattr(triton_wing, "version", None)
    for op in OPS:
        assert base.choose(op, tensor, None, sizes=sizes) == "cuda"


@needs_sources
def test_it_says_why_not(built, monkeypatch):
    assert why_not() is None
    assert why_not("cpu") == "it takes cuda tensors, got cpu"
    assert why_not(dtype=torch.float64) == "it takes float32, float16 and bfloat16, got torch.float64"
    assert why_not(head_dim=257) == "it takes head_dim up to 256, got 257"
    assert base.reasons("nothing", torch.device("cuda"), torch.float32)["cuda"] == "it has no nothing"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not() == "it needs compute capability 8.0, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + 2 * (device.index or 0), 0))
    assert why_not() == "it needs compute capability 8.0, got 7.0"
    assert why_not("cuda:1") is None  # the tensor's own device, not the current one
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert why_not() == "it was built for 80, 90a, which a GPU of 10.3 does not run"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert why_not() == "it takes cuda tensors, got ROCm ones"
    built.update(cuda=None, no_cuda="no nvcc was found")
    assert why_not() == "the extension was built without CUDA: no nvcc was found"
    monkeypatch.setattr(extension, "load_error", "it is not there")
    assert why_not() == "it is not there"


@pytest.mark.parametrize(
    ("arch", "runs", "does_not"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (12, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100a", [(10, 0)], [(10, 3), (9, 0)]),
        ("90-virtual", [(9, 0), (10, 3), (12, 1)], [(8, 9)]),
    ],
)
def test_which_code_runs_where(arch, runs, does_not):
    assert all(cuda_wing.serves(arch, gpu) for gpu in runs)
    assert not any(cuda_wing.serves(arch, gpu) for gpu in does_not)


@needs_sources
def test_the_limits_are_those_of_the_sources():
    headers = "".join(h.read_text() for h in (ROOT / "csrc").rglob("*.h"))
    most = {name: int(re.search(rf"k{name} = (\d+)", headers)[1]) for name in ("MostDim", "MostBands")}
    assert cuda_wing.LIMITS["head_dim"] == cuda_wing.LIMITS["value_dim"] == most["MostDim"]
    assert cuda_wing.LIMITS["bands"] == most["MostBands"]


@pytest.mark.skipif(extension.module is None, reason="no extension")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_its_ops_are_bound_where_it_was_built():
    """Called without a GPU, an op of C++ says so; one that is not bound has no kernel at all."""
    if extension.module.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    assert len(OPS) >= 6
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_attn::{op}.cuda", "CUDA")


@pytest.mark.skipif(extension.module is None, reason="no extension")
def test_no_kernel_spills_and_each_has_eight_warps():
    """Registers and local memory of every kernel for every GPU that it was built for."""
    if extension.module.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    if gpu_code.find_cuobjdump() is None:
        pytest.skip("cuobjdump is not here (CUDA toolkit, or Triton's copy)")
    found = gpu_code.usages(gpu_code.library())
    archs = {a for a in extension.module.build_info()["cuda_archs"] if not a.endswith("-virtual")}
    assert {u.arch for u in found} == archs
    assert any("attend_tiles_kernel" in u.kernel for u in found)
    assert not [u for u in found if u.stack or u.local], "these use local memory"
    assert not [u for u in found if u.warps < 8], "these leave a multiprocessor too few warps"
