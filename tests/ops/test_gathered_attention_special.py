"""gathered_attention where something is special: no queries or keys, NaN, infinities, large scores, strides of 0."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.inputs import index_rows, normal, qkv

from ops.test_gathered_attention import check, run_with_gradients


@pytest.mark.parametrize("shared", [1, 4, 8])
def test_a_gradient_of_strides_zero(wing, shared):
    inputs, indices = qkv(1, shared, 1, 3, 7, 16), index_rows((1, 1, 3, 5), 7)
    leaves = [t.clone().requires_grad_() for t in inputs]
    (wing.gathered_attention(*leaves, indices) * torch.ones(1, shared, 3, 16)).sum().backward()
    for ours, want in zip(_backward(wing, inputs, indices), leaves, strict=True):
        assert torch.equal(ours.grad, want.grad)


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shared", [1, 4])
def test_a_gradient_that_begins_anywhere(wing, dtype, shared):
    """Contiguous, but not on 16 bytes: as the backward of a concatenation hands it on."""
    inputs, indices = qkv(1, shared, 1, 3, 7, 16, dtype=dtype), index_rows((1, 1, 3, 5), 7)
    gradient = normal(1, shared, 3, 16, dtype=dtype, seed=5)
    inside = torch.cat([gradient.new_zeros(1), gradient.flatten()])[1:].view(gradient.shape)
    assert inside.is_contiguous()
    assert inside.storage_offset() == 1
    ours, want = (_gradients(wing, inputs, indices, g) for g in (inside, gradient))
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


def _gradients(wing, inputs, indices, gradient):
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(wing.gathered_attention(*leaves, indices), leaves, gradient)


def _backward(wing, inputs, indices):
    """Leaves with the gradients of a sum."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    wing.gathered_attention(*leaves, indices).sum().backward()
    return leaves


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4), (1, 2, 1, 0, 4), (1, 2, 1, 3, 0)], ids=str)
def test_nothing(wing, shape):
    inputs = qkv(*shape, 8)
    out, lse = wing.gathered_attention(
        *inputs, index_rows((shape[0], 2, shape[3], 2), shape[4]), return_lse=True
    )
    assert not out.any()
    assert bool((lse == -math.inf).all())
    assert not any(
        t.grad.any() for t in _backward(wing, inputs, index_rows((shape[0], 1, shape[3], 2), shape[4]))
    )


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shared", [1, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_empty_slots_do_not_leak(wing, dtype, shared, bad):
    """A key that no row names may hold anything, key 0 among them, forward and backward."""
    inputs, indices = qkv(1, shared, 1, 3, 9, 16, dtype=dtype), index_rows((1, 1, 3, 5), 8)
    indices = torch.where(indices == 0, -1, indices)
    want, _ = run_with_gradients(wing, inputs, indices)
    for tensor in inputs[1:]:
        tensor[:, :, 0] = tensor[:, :, 8] = bad
    ours, _ = run_with_gradients(wing, inputs, indices)
    assert all(torch.equal(mine, true) for mine, true in zip(ours, want, strict=True))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shared", [1, 8])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan(wing, dtype, shared, place):
    """NaN in an input is NaN in the rows that see it and in no other, and in the gradients that they reach."""
    inputs = qkv(1, shared, 1, 3, 9, 16, dtype=dtype)
    indices = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 7]], dtype=torch.int32).view(1, 1, 3, 3)
    inputs[place][0, 0, 1, 3] = (
        math.nan
    )  # of query 1, which sees keys 3 and 4, or of key 1, which query 0 sees
    (out, lse, to_query, to_key, _), _ = run_with_gradients(wing, inputs, indices)
    row = 1 if place == 0 else 0
    rows = torch.tensor([i == row for i in range(3)])
    seen = torch.tensor([j in (indices[0, 0, row]) for j in range(9)])
    head = 0 if place == 0 else slice(None)
    assert torch.equal(out.isnan().any(-1)[0, head].expand(shared, -1)[0], rows)
    assert torch.equal(lse.isnan()[0, 0], rows if place < 2 else torch.zeros(3, dtype=torch.bool))
    assert torch.equal(to_query.isnan().any(-1)[0, 0], rows)
    assert not bool(to_key.isnan().any(-1)[0, 0, ~seen].any())
    assert bool(to_key.isnan().any(-1)[0, 0, seen].any())


@pytest.mark.parametrize("shared", [1, 8])
def test_rows_of_minus_infinity(wing, shared):
    """Scores of −inf are no attention: out 0, LSE −inf, gradients 0 and no NaN."""
    query, key, value = qkv(1, shared, 1, 2, 5, 8, dtype=torch.bfloat16)
    query = query.abs() + 0.1
    key[..., :3, :] = -math.inf
    indices = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32).view(1, 1, 2, 2)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, lse = wing.gathered_attention(*leaves, indices, return_lse=True)
    out.sum().backward()
    assert not out[:, :, 0].any()
    assert bool((lse[:, :, 0] == -math.inf).all())
    assert bool(out.isfinite().all())
    assert not value.grad[:, :, :3].any()
    assert bool(value.grad.isfinite().all())


def test_large_scores(wing):
    """The rounding of an LSE of thousands is no factor on float32 gradients."""
    inputs = [30 * t for t in qkv(1, 2, 1, 3, 20, 16)]
    check(wing, inputs, index_rows((1, 2, 3, 9), 20), 0.5)
