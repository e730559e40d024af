"""Any strides, any size, nothing at all: the same numbers as from plain contiguous tensors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close, assert_identical
from helpers.inputs import LAYOUTS, integers, mask, normal, qkv


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(wing, dtype, layout):
    """Around the views lies NaN, so that a wrong stride or offset cannot pass."""
    plain = qkv(2, 4, 2, 9, 23, 11, 6, dtype=dtype)
    options = {"is_causal": True, "causal_offset": 14, "window": 2, "sinks": 1, "return_lse": True}
    results = []
    for make in (torch.clone, LAYOUTS[layout]):
        inputs = [make(t).requires_grad_() for t in plain]
        assert all(torch.equal(t, p) for t, p in zip(inputs, plain, strict=True))
        out, lse, indices = wing.topk_attention(*inputs, 5, return_indices=True, **options)
        grads = torch.autograd.grad(out, inputs, normal(*out.shape, dtype=dtype, seed=7))
        staged = wing.gathered_attention(*inputs, indices)
        results.append((indices, wing.topk_select(*inputs[:2], 5), out, lse, staged, *grads))
    names = ("indices", "all indices", "out", "lse", "staged out", "dquery", "dkey", "dvalue")
    for name, want, got in zip(names, *results, strict=True):
        if name.endswith("indices"):
            assert torch.equal(got, want)
        else:
            assert got.stride() == want.stride() or name.startswith("d"), f"{name}: stride {got.stride()}"
            assert_close(got, want.double(), name)


@pytest.mark.parametrize("mixed", [(0, 1, 2), (3, 4, 5), (5, 0, 1), (2, 5, 4)])
def test_mixed_strides(wing, mixed):
    plain = qkv(2, 4, 2, 9, 23, 11, 6)
    layouts = list(LAYOUTS.values())
    inputs = [layouts[number](t) for number, t in zip(mixed, plain, strict=True)]
    assert_close(wing.topk_attention(*inputs, 5), wing.topk_attention(*plain, 5).double(), "out")


def test_expanded_tensors(wing, dtype):
    """Stride 0 in batch, heads, time and the last dimension."""
    query = normal(1, 2, 5, 1, dtype=dtype).expand(3, 2, 5, 8)
    key = normal(1, 1, 9, 8, dtype=dtype).expand(3, 2, 9, 8)
    value = normal(3, 2, 1, 8, dtype=dtype).expand(3, 2, 9, 8)
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    plain = [t.detach().contiguous().requires_grad_() for t in (query, key, value)]
    ours, want = wing.topk_attention(*inputs, 4), wing.topk_attention(*plain, 4)
    assert_close(ours, want.double(), "out")
    grads, want_grads = (
        torch.autograd.grad(out.sum(), leaves) for out, leaves in ((ours, inputs), (want, plain))
    )
    for got, true in zip(grads, want_grads, strict=True):
        assert_close(got, true.double(), "gradient")


def test_query_inside_a_packed_projection(wing, dtype):
    """[B, T, (Hq + 2·Hkv)·D], split into heads without a copy, as a model does; the gradient too."""
    packed = normal(2, 13, (4 + 2 + 2) * 8, dtype=dtype).requires_grad_()
    query, key, value = packed.unflatten(-1, (-1, 8)).transpose(1, 2).split((4, 2, 2), dim=1)
    out = wing.topk_attention(query, key, value, 5, is_causal=True)
    out.transpose(1, 2).flatten(2).sum().backward()
    plain = [t.detach().clone(memory_format=torch.contiguous_format) for t in (query, key, value)]
    indices = wing.topk_select(*plain[:2], 5, is_causal=True)
    want = oracle.gradients(*plain, indices, torch.ones_like(out))
    want = torch.cat(want, 1).transpose(1, 2).flatten(2)
    assert_close(packed.grad, want, "gradient", units=2)


def test_inputs_are_not_changed(wing, dtype):
    inputs = [LAYOUTS["inside"](t).requires_grad_() for t in qkv(2, 4, 2, 9, 23, 11, dtype=dtype)]
    seen, lengths = mask(2, 1, 9, 23), torch.tensor([23, 20])
    before = [t.clone() for t in (*inputs, seen, lengths)]
    wing.topk_attention(*inputs, 5, attn_mask=seen, key_lengths=lengths).sum().backward()
    assert all(torch.equal(t, b) for t, b in zip((*inputs, seen, lengths), before, strict=True))


EMPTY = {  # (B, Hq, Hkv, Tq, Tk, D, Dv)
    "no batch": (0, 4, 2, 5, 7, 8, 6),
    "no queries": (2, 4, 2, 0, 7, 8, 6),
    "no keys": (2, 4, 2, 5, 0, 8, 6),
    "nothing": (0, 1, 1, 0, 0, 1, 1),
}


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("case", EMPTY)
def test_empty_tensors(wing, dtype, case, share):
    batch, heads, kv_heads, queries, keys, dim, value_dim = EMPTY[case]
    inputs = [t.requires_grad_() for t in qkv(*EMPTY[case], dtype=dtype)]
    groups = {"none": heads, "kv": kv_heads, "all": 1}[share]
    for options in (
        {},
        {"is_causal": True, "causal_offset": 0, "window": 1, "sinks": 1},
        {"attn_mask": torch.ones(batch, 1, queries, keys, dtype=torch.bool)},
        {"key_lengths": torch.zeros(batch, dtype=torch.int32)},
    ):
        out, lse, indices = wing.topk_attention(
            *inputs, 3, share=share, return_lse=True, return_indices=True, **options
        )
        assert out.shape == (batch, heads, queries, value_dim)
        assert lse.shape == (batch, heads, queries)
        assert indices.shape == (batch, groups, queries, min(3, keys))
        assert out.dtype == dtype
        assert not out.any()
        assert bool((lse == -math.inf).all())
        grads = torch.autograd.grad(out.sum() + 0 * lse.nan_to_num(0, 0, 0).sum(), inputs)
        for tensor, grad in zip(inputs, grads, strict=True):
            assert grad.shape == tensor.shape
            assert not grad.any()
        assert wing.gathered_attention(*inputs, indices).shape == out.shape


def test_no_slots(wing, dtype):
    """indices with K = 0: nothing to attend to."""
    inputs = [t.requires_grad_() for t in qkv(1, 2, 1, 3, 5, 4, dtype=dtype)]
    out, lse = wing.gathered_attention(*inputs, torch.empty(1, 2, 3, 0, dtype=torch.int32), return_lse=True)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (2, 256), (7, 3), (72, 1), (256, 2), (257, 300), (320, 64)]
)
@pytest.mark.parametrize("length", [1, 2, 33])
def test_head_dimensions(wing, dtype, dim, value_dim, length):
    """Up to 256 is promised; beyond it the answer must be right as well, or a ValueError."""
    inputs = qkv(1, 2, 1, length, length, dim, value_dim, dtype=dtype, make=integers)
    options = {"is_causal": True, "scale": 0.05}
    try:
        out, indices = wing.topk_attention(*inputs, 7, return_indices=True, **options)
    except ValueError as error:
        assert max(dim, value_dim) > 256, error  # noqa: PT017
        return
    assert_identical(indices, *inputs[:2], 7, **options)
    assert_close(out, oracle.topk_attention(*inputs, 7, **options)[0], "out")
