"""Gradients: gradcheck, who gets one, dead rows, the LSE's, and no second order."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import OPTIONS, index_rows, mask, normal, options_for, qkv
from helpers.wings import HALF_DTYPES


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck_gathered_attention(wing, dtype, groups, garbage):
    inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 3, 6, 4, 5, dtype=dtype)]
    indices = index_rows((2, groups, 3, 4), 6, garbage=garbage)
    assert torch.autograd.gradcheck(lambda *qkv: wing.gathered_attention(*qkv, indices), inputs)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("name", ["plain", "window_sinks", "everything"])
def test_gradcheck_topk_attention(wing, dtype, name, share):
    """The selection is piecewise constant: at a generic point the op is as smooth as attention."""
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 5, 7, 3, 2, dtype=dtype)]
    options = options_for(name, *inputs[:2]) | {"share": share}
    assert torch.autograd.gradcheck(lambda *qkv: wing.topk_attention(*qkv, 5, **options), inputs)


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_slope_along_a_direction(wing, dtype, groups):
    """What gradcheck does, for wings without float64: ⟨gradient, direction⟩ is the slope of the oracle."""
    inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 3, 6, 4, 5, dtype=dtype)]
    indices = index_rows((2, groups, 3, 4), 6, garbage=True)
    out = wing.gathered_attention(*inputs, indices)
    weights = normal(*out.shape, seed=4)
    gradients = torch.autograd.grad(out, inputs, weights)
    for number in range(len(inputs)):
        direction = normal(*inputs[number].shape, seed=20 + number).double()
        ends = []
        for step in (1e-6, -1e-6):
            moved = [t.detach().double() for t in inputs]
            moved[number] += step * direction
            ends.append((oracle.gathered_attention(*moved, indices)[0] * weights).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradients[number] * direction).sum(), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_out_and_lse_in_the_loss(wing, dtype, name, share):
    inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 7, 12, 6, 5, dtype=dtype)]
    options = options_for(name, *inputs[:2]) | {"share": share}
    out, lse, indices = wing.topk_attention(*inputs, 5, return_lse=True, return_indices=True, **options)
    grad = normal(*out.shape, seed=5, dtype=dtype)
    grad_lse = normal(*lse.shape, seed=6).where(lse > -math.inf, 0.0)
    ours = torch.autograd.grad((out, lse), inputs, (grad, grad_lse))
    want = oracle.gradients(*inputs, indices, grad, grad_lse, options.get("scale"))
    units = 2 if dtype in HALF_DTYPES else None  # the backward may use the rounded `out`
    for tensor, mine, true in zip(("query", "key", "value"), ours, want, strict=True):
        assert_close(mine, true, f"gradient of {tensor}", units=units)


def test_lse_alone_in_the_loss(wing, dtype):
    """d lse / d value is 0, and the rest is the softmax's."""
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 6, 9, 8, dtype=dtype)]
    _, lse, indices = wing.topk_attention(*inputs, 4, return_lse=True, return_indices=True)
    grad_lse = normal(*lse.shape, seed=6)
    ours = torch.autograd.grad(lse, inputs, grad_lse, allow_unused=True)
    want = oracle.gradients(*inputs, indices, torch.zeros(1, 4, 6, 8), grad_lse)
    for name, mine, true in zip(("query", "key"), ours, want[:2], strict=False):
        assert_close(mine, true, f"gradient of {name}")
    assert ours[2] is None or not ours[2].any()


def test_gradient_of_nothing(wing):
    """A loss that uses the indices alone, or an output that is detached, asks for no gradient."""
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 4, 4, 3)]
    out, lse, _ = wing.topk_attention(*inputs, 2, return_lse=True, return_indices=True)
    (out * 0 + lse.unsqueeze(-1) * 0).sum().backward()
    assert all(not t.grad.any() for t in inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("op", ["gathered_attention", "topk_attention"])
def test_only_for_those_that_require_it(wing, op, needed):
    inputs = qkv(1, 2, 1, 5, 8, 4)
    indices = wing.topk_select(*inputs[:2], 3)
    want = oracle.gradients(*inputs, indices, torch.ones(1, 2, 5, 4))
    leaves = [t.clone().requires_grad_(number in needed) for number, t in enumerate(inputs)]
    last = indices if op == "gathered_attention" else 3
    getattr(wing, op)(*leaves, last).sum().backward()
    for number, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (number in needed)
        if leaf.grad is not None:
            assert_close(leaf.grad, want[number], f"gradient {number}")
            assert leaf.grad.dtype == leaf.dtype


def test_dead_rows_have_no_gradient(wing, dtype):
    """A row that sees no key has gradient 0, even where its query and the incoming gradient are NaN."""
    query, key, value = qkv(2, 2, 2, 8, 8, 6, dtype=dtype)
    query[0, 1, 2] = math.nan
    inputs = [t.requires_grad_() for t in (query, key, value)]
    seen = mask(2, 2, 8, 8, seed=3)
    seen[..., 0] = True
    seen[0, :, 2] = False
    seen[1, 1, 7] = False
    out, lse = wing.topk_attention(*inputs, 4, attn_mask=seen, return_lse=True)
    assert bool((lse == -math.inf).eq(~seen.any(-1)).all())
    assert not out[~seen.any(-1)].any()
    grad = normal(*out.shape, dtype=dtype, seed=5)
    grad[0, :, 2] = math.nan
    grads = torch.autograd.grad(out, inputs, grad)
    assert not grads[0][~seen.any(-1)].any()
    assert all(bool(g.isfinite().all()) for g in grads)


def test_keys_that_nobody_attends_to_have_no_gradient(wing, dtype):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 6, 30, 8, dtype=dtype)]
    out, indices = wing.topk_attention(*inputs, 2, return_indices=True)
    grads = torch.autograd.grad(out.sum(), inputs)
    unused = torch.ones(1, 2, 30, dtype=torch.bool)
    unused.scatter_(2, indices.flatten(2).long(), False)
    assert bool(unused.any())
    assert not grads[1][unused].any()
    assert not grads[2][unused].any()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every_second"])
def test_incoming_gradients_of_any_strides(wing, dtype, layout):
    inputs = [t.requires_grad_() for t in qkv(2, 2, 1, 5, 8, 4, 6, dtype=dtype)]
    out, lse = wing.topk_attention(*inputs, 3, return_lse=True)
    grad, grad_lse = {
        "expanded": (torch.ones((), dtype=dtype).expand(out.shape), torch.ones(()).expand(lse.shape)),
        "transposed": (normal(2, 2, 6, 5, dtype=dtype).mT, normal(5, 2, 2).permute(2, 1, 0)),
        "every_second": (normal(2, 2, 5, 12, dtype=dtype)[..., ::2], normal(2, 2, 10)[..., ::2]),
    }[layout]
    ours = torch.autograd.grad((out, lse), inputs, (grad, grad_lse), retain_graph=True)
    want = torch.autograd.grad((out, lse), inputs, (grad.contiguous(), grad_lse.contiguous()))
    assert all(torch.equal(mine, plain) for mine, plain in zip(ours, want, strict=True))


def test_gradients_add_up(wing):
    """Two uses of one tensor: query, key and value the same."""
    x = normal(1, 2, 6, 4).requires_grad_()
    wing.topk_attention(x, x, x, 3, is_causal=True).sum().backward()
    inputs = [x.detach().clone().requires_grad_() for _ in range(3)]
    wing.topk_attention(*inputs, 3, is_causal=True).sum().backward()
    torch.testing.assert_close(x.grad, sum(t.grad for t in inputs))


@pytest.mark.parametrize("op", ["gathered_attention", "topk_attention"])
def test_second_order_is_refused(wing, op):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 4, 4, 3)]
    last = 2 if op == "topk_attention" else wing.topk_select(*inputs[:2], 2)
    out = getattr(wing, op)(*inputs, last)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grads[0].sum().backward()
