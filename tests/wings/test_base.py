"""Which wing runs: the choice, `backend=`, `use_backend`, `explain`, and that nothing falls back in silence."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from helpers.inputs import qkv
from helpers.wings import OPS, wings_under_test
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attn
from sparse_attn.wings import base, extension


class Calls(TorchDispatchMode):
    """The overloads of this package that ran, as `topk_attention.cpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_attn":
            self.names.append(str(func).removeprefix("sparse_attn."))
        return func(*args, **(kwargs or {}))


def call(op: str, inputs, **kwargs):
    if op == "topk_select":
        return sparse_attn.topk_select(*inputs[:2], 3, **kwargs)
    if op == "topk_attention":
        return sparse_attn.topk_attention(*inputs, 3, **kwargs)
    indices = torch.zeros(*inputs[0].shape[:3], 1, dtype=torch.int32, device=inputs[0].device)
    return sparse_attn.gathered_attention(*inputs, indices, **kwargs)


def test_the_extension_is_there_where_it_must_be():
    """CI sets SPARSE_ATTN_REQUIRE_EXT=1, so that no test of the compiled wings is skipped unnoticed."""
    missing = {w.name: w.missing for w in wings_under_test() if w.missing}
    if os.environ.get("SPARSE_ATTN_REQUIRE_EXT") == "1":
        assert "cpu" in {w.name for w in base.wings()}
        assert "cpu" not in missing, missing["cpu"]


def test_every_wing_has_every_op():
    for wing in base.wings():
        if wing.implementations:  # else it is not there at all
            assert {*OPS, "gathered_attention_backward"} <= set(wing.implementations), wing.name
    assert {wing.name for wing in base.wings() if wing.implementations} >= {"triton", "reference"}


@pytest.mark.parametrize("op", OPS)
def test_backend_argument(wing, op):
    inputs = [t.to(wing.device) for t in qkv(1, 2, 2, 4, 4, 8)]
    with Calls() as calls:
        call(op, inputs, backend=wing.name)
    assert calls.names == [f"{op}.{wing.name}"]


@pytest.mark.parametrize("op", OPS)
def test_use_backend(wing, op):
    inputs = [t.to(wing.device) for t in qkv(1, 2, 2, 4, 4, 8)]
    with sparse_attn.use_backend(wing.name), Calls() as calls:
        call(op, inputs)
    assert calls.names == [f"{op}.{wing.name}"]


@pytest.mark.parametrize("op", ["gathered_attention", "topk_attention"])
def test_the_backward_runs_on_the_wing_of_the_forward(wing, op):
    """Also outside the `with`."""
    inputs = [t.to(wing.device).requires_grad_() for t in qkv(1, 2, 2, 4, 4, 8)]
    with sparse_attn.use_backend(wing.name):
        out = call(op, inputs)
    with Calls() as calls:
        out.sum().backward()
    assert calls.names == [f"gathered_attention_backward.{wing.name}"]


def test_the_argument_wins_over_the_context(wing):
    inputs = [t.to(wing.device) for t in qkv(1, 2, 2, 4, 4, 8)]
    for context in base.wings():
        with sparse_attn.use_backend(context.name), Calls() as calls:
            call("topk_attention", inputs, backend=wing.name)
        assert calls.names == [f"topk_attention.{wing.name}"]


def test_the_most_preferred_wing_that_can_is_chosen(wing, dtype):
    """Without a word the first registered wing that takes the call runs it, and explain says the same."""
    inputs = [t.to(wing.device) for t in qkv(1, 2, 2, 4, 4, 8, dtype=dtype)]
    takers = [
        w.name
        for w in base.wings()
        if not w.by_name_only and w.why_not("topk_attention", torch.device(wing.device), dtype) is None
    ]
    with Calls() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse_attn.topk_attention(*inputs, 2)
        explanation = sparse_attn.explain(*inputs, 2)
    assert calls.names == [f"topk_attention.{takers[0]}"]
    assert explanation.backend == takers[0]
    assert takers[-1] == "reference"


def test_a_forced_wing_that_cannot_is_an_error_not_a_fallback():
    inputs = qkv(1, 2, 2, 4, 4, 8, dtype=torch.float64)
    for op in OPS:
        with pytest.raises(ValueError, match=f"backend='cpu' cannot run {op} here: "):
            call(op, inputs, backend="cpu")
        with sparse_attn.use_backend("cpu"), pytest.raises(ValueError, match="cannot run"):
            call(op, inputs)
    with pytest.raises(ValueError, match="cannot run topk_attention"):
        sparse_attn.explain(*inputs, 2, backend="cpu")


def test_a_missing_extension_says_why(monkeypatch):
    """Without the compiled wing: the reference runs, and forcing or explaining says what is missing."""

    monkeypatch.setattr(extension, "load_error", "the compiled extension is not installed (a test)")
    inputs = qkv(1, 2, 2, 4, 4, 8)
    explanation = sparse_attn.explain(*inputs, 2)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "the compiled extension is not installed (a test)"
    with pytest.raises(ValueError, match="is not installed"):
        sparse_attn.topk_attention(*inputs, 2, backend="cpu")


def test_a_broken_extension_says_why(monkeypatch):
    """Missing and broken are told apart, and an import error from elsewhere is not swallowed."""
    from sparse_attn.wings import extension

    def fail_with(error):
        def load(name):
            raise error

        monkeypatch.setattr(extension, "import_module", load)

    fail_with(ModuleNotFoundError("No module named 'sparse_attn._C'", name="sparse_attn._C"))
    assert "not installed" in extension._load()[1]
    fail_with(ImportError("undefined symbol: spam"))
    assert "failed to load: undefined symbol: spam" in extension._load()[1]
    fail_with(ModuleNotFoundError("No module named 'numpy'", name="numpy"))
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        extension._load()


class TestExplain:
    def test_says_what_runs_and_why_not_the_others(self):
        doubles = qkv(1, 2, 2, 4, 4, 8, dtype=torch.float64)
        explanation = sparse_attn.explain(*doubles, 2)
        assert explanation.op == "topk_attention"
        assert explanation.backend == "reference"
        assert set(explanation.reasons) == {w.name for w in base.wings()}
        assert explanation.reasons["reference"] is None
        assert explanation.reasons["cpu"]
        text = str(explanation)
        assert "topk_attention runs on the 'reference' wing" in text
        assert f"cpu: {explanation.reasons['cpu']}" in text
        assert "float64" in text or "extension" in text

    def test_a_less_preferred_wing_is_named_as_such(self, wing):
        inputs = [t.to(wing.device) for t in qkv(1, 2, 2, 4, 4, 8)]
        explanation = sparse_attn.explain(*inputs, 2, backend=wing.name)
        assert explanation.backend == wing.name
        for name, reason in explanation.reasons.items():
            if name != wing.name:
                assert f"{name}: {reason or 'it could'}" in str(explanation)

    def test_takes_every_argument_of_topk_attention(self):
        inputs = qkv(1, 2, 2, 4, 6, 8)
        options = {
            "is_causal": True, "causal_offset": 2, "attn_mask": torch.ones(4, 6, dtype=torch.bool),
            "key_lengths": torch.tensor([6]), "scale": 0.5, "window": 1, "sinks": 1, "share": "all",
            "return_lse": True, "return_indices": True, "backend": "reference",
        }  # fmt: skip
        assert sparse_attn.explain(*inputs, 3, **options).backend == "reference"

    def test_runs_nothing(self):
        with Calls() as calls:
            sparse_attn.explain(*qkv(1, 2, 2, 4, 4, 8), 2)
        assert not calls.names

    def test_follows_the_context(self):
        with sparse_attn.use_backend("reference"):
            assert sparse_attn.explain(*qkv(1, 2, 2, 4, 4, 8), 2).backend == "reference"

    def test_sees_autocast(self):
        """Float32 inputs under autocast run in its dtype; that is what is explained."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reasons = sparse_attn.explain(*qkv(1, 2, 2, 4, 4, 8), 2).reasons
        assert reasons == base.reasons("topk_attention", torch.device("cpu"), torch.bfloat16)


def test_the_reference_warns_once_on_an_accelerator(monkeypatch):
    """No silent fallback: once per op and device, with the reason why no faster wing runs."""
    monkeypatch.setattr(base._state, "warned", set())

    class Elsewhere:
        device, dtype = torch.device("mps"), torch.float32

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # where warnings are errors, each call is one
            with pytest.raises(UserWarning, match="topk_select on mps"):
                base.choose("topk_select", Elsewhere, None)
    with pytest.warns(UserWarning, match=r"topk_select on mps in plain PyTorch \(cpu: "):
        assert base.choose("topk_select", Elsewhere, None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base.choose("topk_select", Elsewhere, None) == "reference"
    with pytest.warns(UserWarning, match="topk_attention on mps"):
        base.choose("topk_attention", Elsewhere, None)
    with warnings.catch_warnings():  # asked for by name, it is no surprise
        warnings.simplefilter("error")
        base.choose("gathered_attention", Elsewhere, "reference")
        sparse_attn.topk_select(*qkv(1, 2, 2, 4, 4, 8)[:2], 2, backend="reference")


def test_no_wing_at_all():
    class Nowhere:
        device, dtype = torch.device("mps"), torch.float64

    with pytest.raises(
        ValueError, match=r"no backend runs topk_select on mps with torch.float64: .*MPS has no"
    ):
        base.choose("topk_select", Nowhere, None)


def test_a_new_wing_is_one_registration(monkeypatch):
    """A wing without an op is passed over for that op, and says so when forced."""
    monkeypatch.setattr(base._state, "wings", dict(base._state.wings))
    base.register(base.Wing("toy", "CPU", {"topk_select": None}, lambda op, device, dtype: None))
    assert [w.name for w in base.wings()][-1] == "toy"
    query = torch.zeros(1, 1, 1, 1)
    assert base.choose("topk_select", query, "toy") == "toy"
    with pytest.raises(
        ValueError, match="backend='toy' cannot run topk_attention here: it has no topk_attention"
    ):
        base.choose("topk_attention", query, "toy")
    assert (
        base.reasons("topk_attention", torch.device("cpu"), torch.float32)["toy"]
        == "it has no topk_attention"
    )
