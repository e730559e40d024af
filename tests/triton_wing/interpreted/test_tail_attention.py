"""tail="mean" in Triton, interpreted: against the reference, and against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import index_rows, normal, qkv
from ops import test_residual_attention as residual
from ops import test_tail as tail

from sparse_attn.ops.tail import OP
from sparse_attn.rule import Rule
from sparse_attn.triton_kernels.lib import tile_chunks

HALF, FLOAT = torch.bfloat16, torch.float32

CASES = {  # dtype, G, sizes, the rule
    "plain": (FLOAT, 4, (2, 4, 2, 10, 70, 8, 5), {"scale": -0.7}),
    "starts": (FLOAT, 2, (2, 4, 2, 20, 70, 8), {"key_starts": torch.tensor([0, 30])}),
    "lengths": (HALF, 1, (2, 4, 2, 10, 70, 8), {"key_lengths": torch.tensor([66, 3])}),
    "cap": (torch.float16, 4, (1, 4, 1, 30, 70, 24), {"is_causal": True, "causal_offset": 40, "softcap": 1.1}),
    "offsets": (HALF, 2, (2, 4, 2, 9, 40, 16), {"is_causal": True, "causal_offset": torch.tensor([31, -3])}),
    "sinks": (FLOAT, 4, (1, 4, 4, 9, 40, 16), {"is_causal": True, "causal_offset": -2, "sink_logits": normal(4)}),
}  # fmt: skip


def found(backend: str, dtype: torch.dtype, groups: int, sizes: tuple, options: dict) -> list[torch.Tensor]:
    """out, LSE, the probability outside of the selection, and the gradients; indices are in no order, and some name no
    key."""
    query, key, value = qkv(*sizes, dtype=dtype)
    indices = index_rows((sizes[0], groups, sizes[3], 25), sizes[4], garbage=True)
    packed = Rule(**options).packed(query, key)._replace(groups=groups)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, lse, outside = OP.on(backend)(*leaves, indices, *packed.parts())
    grads = normal(*out.shape, seed=5, dtype=dtype), normal(*lse.shape, seed=6).where(lse > -math.inf, 0.0)
    return [out, lse, outside, *torch.autograd.grad((out, lse), leaves, grads)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in chunks and pieces"])
def test_as_the_reference(wing, name, cut, monkeypatch):
    """Also with the bits of some queries at a time, and dK and dV in pieces that are added."""
    if cut:
        monkeypatch.setattr(tile_chunks, "SCRATCH_BYTES", 200)
        monkeypatch.setattr(tile_chunks, "SMALLEST", 16)
    dtype, *others = CASES[name]
    for ours, want in zip(found("triton", dtype, *others), found("reference", dtype, *others), strict=True):
        assert ours.dtype == want.dtype
        assert torch.equal(ours.isfinite(), want.isfinite())
        half = want.dtype in (HALF, torch.float16)
        close = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours, want, **close)


SMALLER = {  # as there, of fewer queries and keys, which still are several tiles
    "most chosen": ((1, 2, 1, 9, 70, 16, 40), 62, {}),
    "shared": ((2, 4, 2, 9, 70, 8, 8), 7, {"is_causal": True, "causal_offset": 55, "share": "kv"}),
    "cap and sinks": ((1, 4, 2, 40, 40, 8, 8), 5, {"is_causal": True, "softcap": 1.5, "sink_logits": tail.SINKS}),
    "offsets": ((2, 2, 1, 5, 70, 8, 8), 4, {"is_causal": True, "causal_offset": torch.tensor([65, 20])}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"), [("most chosen", HALF), ("shared", FLOAT), ("cap and sinks", FLOAT), ("offsets", HALF)]
)
def test_formula_and_gradients(wing, name, dtype, monkeypatch):
    monkeypatch.setitem(tail.CASES, name, SMALLER[name])
    tail.test_formula_and_gradients(wing, dtype, name, "mean")


def test_equal_values_and_scores(wing):
    residual.test_equal_values_come_out_as_they_are(wing)
    residual.test_equal_scores_are_dense_attention(wing)


def test_nan(wing):
    tail.nan_reaches_only_those_that_see_it(wing, "mean", (5,), 40, 20, 33)


@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 5, 7, 4, 4), (2, 2, 1, 0, 7, 4, 4), (2, 2, 1, 5, 0, 4, 4)], ids=str
)
def test_nothing(wing, sizes):
    residual.test_nothing(wing, sizes)
    query, key, value = qkv(*sizes)
    indices = torch.empty(sizes[0], 1, sizes[3], 0, dtype=torch.int32)
    rule = Rule(sink_logits=normal(2)).packed(query, key)
    ours, want = (OP.on(b)(query, key, value, indices, *rule.parts()) for b in ("triton", "reference"))
    for one, other in zip(ours, want, strict=True):
        assert torch.equal(one, other)
