"""topk_attention: select, then attend; its flags; and the same as dense attention when every key is kept."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_close, assert_identical
from helpers.inputs import OPTIONS, integers, mask, normal, options_for, qkv
from helpers.wings import HALF_DTYPES
from torch.nn.functional import scaled_dot_product_attention


def split(options: dict) -> dict:
    """The options that gathered_attention takes as well."""
    return {"scale": options["scale"]} if "scale" in options else {}


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_select_then_attend(wing, dtype, name, share):
    """The fused op gives what its two stages give, gradients included."""
    inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 13, 29, 8, 12, dtype=dtype, make=integers)]
    options = options_for(name, *inputs[:2]) | {"share": share}
    out, lse, indices = wing.topk_attention(*inputs, 6, return_lse=True, return_indices=True, **options)
    assert torch.equal(indices, wing.topk_select(*inputs[:2], 6, **options))
    staged, staged_lse = wing.gathered_attention(*inputs, indices, return_lse=True, **split(options))
    assert_close(out, staged, "out")
    assert_close(lse, staged_lse, "lse", units=4)
    grad = normal(*out.shape, dtype=dtype, seed=9)
    for ours, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(staged, inputs, grad), strict=True
    ):
        assert_close(ours, want, "gradient")


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_oracle(wing, dtype, name):
    inputs = qkv(2, 4, 2, 11, 37, 9, 5, dtype=dtype, make=integers, seed=1)
    options = options_for(name, *inputs[:2])
    out, lse, indices = wing.topk_attention(*inputs, 7, return_lse=True, return_indices=True, **options)
    want, want_lse, want_indices = oracle.topk_attention(*inputs, 7, **options)
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)


def test_flags(wing, dtype):
    inputs = qkv(1, 4, 2, 6, 6, 8, 5, dtype=dtype)
    out = wing.topk_attention(*inputs, 3)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, 4, 6, 5)
    assert out.dtype == dtype
    with_lse = wing.topk_attention(*inputs, 3, return_lse=True)
    with_indices = wing.topk_attention(*inputs, 3, return_indices=True, share="kv")
    with_both = wing.topk_attention(*inputs, 3, return_lse=True, return_indices=True)
    assert [len(with_lse), len(with_indices), len(with_both)] == [2, 2, 3]
    assert torch.equal(with_lse[0], out)
    assert with_lse[1].shape == (1, 4, 6)
    assert with_lse[1].dtype == torch.float32
    assert with_indices[1].shape == (1, 2, 6, 3)
    assert with_indices[1].dtype == torch.int32
    for one, two in zip(with_both, (out, with_lse[1], wing.topk_select(*inputs[:2], 3)), strict=True):
        assert torch.equal(one, two)
    assert all(t.is_contiguous() for t in with_both)


def test_outputs_that_need_no_gradient(wing):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 6, 6, 8)]
    out, lse, indices = wing.topk_attention(*inputs, 3, return_lse=True, return_indices=True)
    assert [out.requires_grad, lse.requires_grad, indices.requires_grad] == [True, True, False]
    with torch.no_grad():
        assert not wing.topk_attention(*inputs, 3).requires_grad
    with torch.inference_mode():
        assert torch.equal(wing.topk_attention(*inputs, 3), out.detach())


DENSE = {
    "plain": (qkv(2, 3, 3, 19, 19, 16), {}),
    "causal": (qkv(2, 3, 3, 35, 35, 16), {"is_causal": True}),
    "grouped": (qkv(2, 6, 2, 35, 35, 16, 24), {"is_causal": True}),
    "one key head": (qkv(1, 4, 1, 9, 40, 20, 8), {}),
    "mask": (qkv(2, 4, 4, 21, 30, 8), {"attn_mask": mask(2, 4, 21, 30) | torch.eye(21, 30).bool()}),
    "grouped mask": (qkv(2, 4, 2, 21, 30, 8), {"attn_mask": mask(2, 1, 21, 30) | torch.eye(21, 30).bool()}),
    "one query": (qkv(3, 2, 1, 1, 65, 64), {}),
    "wide": (qkv(1, 1, 1, 33, 33, 256, 256), {"is_causal": True}),
}


@pytest.mark.parametrize("share", ["none", "all"])
@pytest.mark.parametrize("extra", [0, 100])
@pytest.mark.parametrize("case", DENSE)
def test_every_key_kept_is_dense_attention(wing, dtype, case, extra, share):
    """Forward and backward are PyTorch's own in float64, to the rounding of the dtype.

    In float64, because what its kernels make of the half types differs from CPU to CPU.
    """
    inputs, options = DENSE[case]
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    heads, kv_heads = inputs[0].shape[1], inputs[1].shape[1]
    if share == "all" and options.get("attn_mask", mask(1)).dim() == 4 and case == "mask":
        options = {"attn_mask": options["attn_mask"][:, :1]}  # heads that share see the same
    out = wing.topk_attention(*inputs, inputs[1].shape[2] + extra, share=share, **options)
    dense = scaled_dot_product_attention(*exact, enable_gqa=heads != kv_heads, **options)
    assert_close(out, dense, "out")
    grad = normal(*out.shape, dtype=dtype, seed=9)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(dense, exact, grad.double())
    units = 2 if dtype in HALF_DTYPES else None  # a gradient may use the rounded `out`: a second rounding
    for name, mine, want in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert_close(mine, want, f"gradient of {name}", units=units)


def test_selection_of_normal_inputs(wing, dtype):
    query, key, value = qkv(2, 4, 2, 65, 65, 32, dtype=dtype)
    options = {"is_causal": True, "window": 4, "sinks": 2}
    for share in ("none", "kv", "all"):
        indices = wing.topk_attention(query, key, value, 12, return_indices=True, share=share, **options)[1]
        assert_best(indices, query, key, 12, share=share, **options)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 63, 65, 127, 257])
def test_lengths(wing, dtype, length):
    inputs = qkv(1, 2, 1, length, length, 6, dtype=dtype, make=integers)
    options = {"is_causal": True}
    out, indices = wing.topk_attention(*inputs, 10, return_indices=True, **options)
    assert_identical(indices, *inputs[:2], 10, **options)
    want = oracle.topk_attention(*inputs, 10, **options)[0]
    assert_close(out, want, "out")
