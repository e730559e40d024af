"""The Triton wing among the others: when it is taken, when not and why, and that it costs nothing until then."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparse_attn
from sparse_attn.wings import base, extension
from sparse_attn.wings import triton as triton_wing

ROOT = Path(__file__).resolve().parents[2]


class On:
    """What the dispatcher looks at of a tensor."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = torch.device(device), dtype


@pytest.fixture
def compiled_triton(monkeypatch):
    """As on a machine with Triton alone and without the interpreter, whatever this one has."""
    monkeypatch.setattr(extension, "load_error", "not here")
    monkeypatch.setattr(triton_wing, "version", (3, 6))
    monkeypatch.setattr(triton_wing, "interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def why_not(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **sizes) -> str | None:
    return base.reasons("topk_attention", torch.device(device), dtype, **sizes)["triton"]


def run(code: str, **variables: str) -> str:
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("op", triton_wing.OPS)
def test_it_is_chosen_on_gpus(compiled_triton, device, op):
    for dtype in triton_wing.DTYPES:
        assert base.choose(op, On(device, dtype), None, sizes={"head_dim": 256, "value_dim": 256}) == "triton"


def test_it_stands_between_the_compiled_wing_and_the_reference():
    names = [wing.name for wing in base.wings()]
    assert names.index("cpu") < names.index("triton") < names.index("reference") == len(names) - 1


def test_it_says_why_not(compiled_triton, monkeypatch):
    assert why_not() is None
    assert why_not("cpu") == (
        "it takes cpu tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    )
    assert why_not("mps") == "it takes cuda and xpu tensors, got mps"
    assert why_not(dtype=torch.float64) == "it takes float32, float16 and bfloat16, got torch.float64"
    assert why_not(head_dim=256, value_dim=257) == "it takes value_dim up to 256, got 257"
    monkeypatch.setattr(triton_wing, "version", (3, 1))
    assert why_not() == "it needs Triton 3.2, got 3.1"
    monkeypatch.setattr(triton_wing, "version", None)
    assert why_not() == "Triton is not installed (pip install triton)"


@pytest.mark.skipif(torch.version.hip is not None, reason="an AMD build of torch")
def test_old_gpus_are_left_to_the_reference(compiled_triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + 2 * (device.index or 0), 5))
    assert why_not() == "it needs compute capability 8.0, got 7.5"
    assert why_not("cuda:1") is None  # the tensor's own device, not the current one
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not() is None


def test_large_heads_are_explained():
    """What explain says is what the dispatcher does: the limits are read in one place."""
    query = torch.zeros(1, 1, 2, 300)
    reasons = sparse_attn.explain(query, query, query, 1).reasons
    if triton_wing.interpreted:
        assert reasons["triton"] == "it takes head_dim up to 256, got 300"
    for op in (sparse_attn.topk_select, sparse_attn.topk_attention):
        with pytest.raises(ValueError, match="backend='triton' cannot run"):
            op(*(query,) * (2 if op is sparse_attn.topk_select else 3), 1, backend="triton")


@pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed")
def test_the_way_of_indices_and_tails(monkeypatch):
    """As on a GPU, where no launch is needed to say it."""
    monkeypatch.setattr(triton_wing, "interpreted", True)  # it takes the CPU's tensors
    query, key = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 300, 16)
    explain = partial(sparse_attn.explain, query, key, key, 5, backend="triton")
    index = sparse_attn.KeyIndex.of(key)
    assert explain().way is None
    assert explain(key_index=index).way.startswith("what the key index cannot rule out is scored")
    assert explain(share="all", key_index=index).way is None
    for tail in ("mean", "blocks"):
        assert explain(tail=tail).way == "the tail on the 'triton' wing"
        assert explain(tail=tail, key_index=index).way.endswith("; the tail on the 'triton' wing")
    pages = torch.zeros(4, 16, 2, 16)
    paged = sparse_attn.explain_call(
        sparse_attn.varlen_topk_attention, query[0].transpose(0, 1), pages, pages, torch.tensor([0, 1]), None, 1, 32, 5,
        seqused_k=torch.tensor([20]), block_table=torch.tensor([[0, 1]], dtype=torch.int32),
        key_index=sparse_attn.PagedKeyIndex.of(pages), backend="triton",
    )  # fmt: skip
    assert paged.way == "without the key index, which it does not read in pages"


def test_importing_the_package_does_not_load_triton():
    code = "import sys, sparse_attn; assert 'sparse_attn.triton_kernels' in sys.modules or {wheel}; "
    code = code.format(wheel=(Path(sparse_attn.__file__).parent / "triton_kernels").is_dir())
    run(code + "assert not {'triton', 'sparse_attn.triton_kernels.gathered_attention'} & set(sys.modules)")


@pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed")
def test_every_op_has_its_function():
    """One file per op, found from a checkout, an editable install and a wheel alike."""
    code = """
import importlib, inspect
from sparse_attn.wings import triton as triton_wing
from sparse_attn.wings.reference.wing import REFERENCE_WING
for op in triton_wing.OPS:
    module = importlib.import_module(f"{triton_wing.PACKAGE}.{op}")
    functions = getattr(module, op), REFERENCE_WING.implementations[op]
    names = [list(inspect.signature(f).parameters) for f in functions]
    assert names[0] == names[1], f"{op}: {names}"
"""
    run(code)


@pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed")
def test_interpreted_it_runs_only_by_name():
    code = """
import json, torch, sparse_attn
query = torch.randn(1, 2, 3, 16)
indices = torch.zeros(1, 1, 3, 1, dtype=torch.int32)
ours = sparse_attn.gathered_attention(query, query, query, indices, backend="triton")
with sparse_attn.use_backend("triton"):
    also = sparse_attn.gathered_attention(query, query, query, indices)
want = sparse_attn.gathered_attention(query, query, query, indices, backend="reference")
torch.testing.assert_close(ours, want)
assert torch.equal(ours, also)
explanation = sparse_attn.explain(query, query, query, 2)
doubles = sparse_attn.explain(*[query.double()] * 3, 2)
print(json.dumps([explanation.backend, explanation.reasons["triton"], doubles.backend]))
"""
    preferred = (
        "reference" if base.reasons("topk_attention", torch.device("cpu"), torch.float32)["cpu"] else "cpu"
    )
    assert json.loads(run(code, TRITON_INTERPRET="1")) == [preferred, None, "reference"]


def test_kernels_run_on_the_tensors_device(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    entered = []

    class Devices:
        @staticmethod
        @contextmanager
        def device(device):
            entered.append(device)
            yield

    kernels = SimpleNamespace(topk_select=lambda tensor: f"ran with {len(entered)} devices entered")
    monkeypatch.setattr(triton_wing, "import_module", lambda name: kernels)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Devices)
    op = triton_wing._on_first_call("topk_select")
    assert op(On("cuda:1")) == "ran with 1 devices entered"
    assert entered == [torch.device("cuda:1")]
    assert op(On("cpu")) == "ran with 1 devices entered"


def test_the_name_on_top_is_not_taken():
    """`triton_kernels` belongs to another project: installed, these kernels are inside the package."""
    # A RECORD lists what was installed; the egg-info of a checkout lists its sources.
    installed = [d for d in importlib.metadata.distributions(name="sparse-attn") if d.read_text("RECORD")]
    assert not [f for d in installed for f in d.files if f.parts[0] == "triton_kernels"]
    assert Path(sys.modules[triton_wing.PACKAGE].__path__[0]).name == "triton_kernels"


def test_the_doctor_lists_it():
    from sparse_attn.cli import doctor

    found = {(w["wing"], w["device"]): w for w in doctor.examine()["wings"]}
    assert found["triton", "cpu"]["why_not"] == why_not("cpu", torch.float32)
