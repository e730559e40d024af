"""topk_attention_with_residual against its formula, dense, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import qkv

import sparse_attn

CASES = {
    "plain": ((2, 4, 2, 17, 40, 8, 6), 6, {}),
    "causal": ((1, 4, 2, 40, 40, 8, 8), 5, {"is_causal": True, "window": 2, "sinks": 1}),
    "shared": ((2, 4, 2, 30, 50, 8, 8), 7, {"is_causal": True, "causal_offset": 20, "share": "kv"}),
    "one for all": ((1, 6, 3, 20, 30, 8, 8), 7, {"share": "all", "scale": 0.9}),
    "lengths": ((2, 2, 1, 12, 30, 8, 5), 4, {"key_lengths": torch.tensor([30, 3])}),
    "starts": ((2, 2, 1, 12, 30, 8, 5), 4, {"key_starts": torch.tensor([0, 25]), "sinks": 1}),
    "starts of queries": (
        (1, 4, 2, 40, 40, 8, 8),
        5,
        {"is_causal": True, "key_starts": torch.tensor([[-1] * 13 + [13] * 2 + [15] * 20 + [99] * 5])},
    ),
    "nothing seen": ((1, 2, 2, 20, 20, 8, 8), 3, {"is_causal": True, "causal_offset": -6}),
}


def formula(query, key, value, top_k, **options):
    seen = oracle.visible(query, key, **options)
    _, _, indices = oracle.topk_attention(query, key, value, top_k, **options)
    chosen = oracle.multiplicity(query, key, indices) > 0
    scores = oracle.scores(query, key, options.get("scale")).masked_fill(~seen, -math.inf)
    mass = scores.softmax(-1).masked_fill(~seen, 0.0)
    outside = seen & ~chosen
    value = value.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    tail = (outside.double() @ value) / outside.sum(-1, keepdim=True).clamp(min=1)
    kept = mass.masked_fill(~chosen, 0.0)
    return kept @ value + (mass.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)) * tail


@pytest.mark.parametrize("name", CASES)
def test_formula(wing, dtype, name):
    sizes, top_k, options = CASES[name]
    inputs = qkv(*sizes, dtype=dtype)
    out = wing.topk_attention_with_residual(*inputs, top_k, **options)
    assert out.dtype == dtype
    units = 2 if dtype in (torch.bfloat16, torch.float16) else None
    # lse is float32 whatever the inputs are
    want = formula(*inputs, top_k, **options)
    assert_close(out.float() if dtype == torch.float64 else out, want, "out", units=units)


def test_everything_selected_is_dense_attention(wing):
    query, key, value = qkv(1, 4, 2, 30, 30, 16)
    out = wing.topk_attention_with_residual(query, key, value, 30, is_causal=True)
    assert torch.equal(out, wing.topk_attention(query, key, value, 30, is_causal=True))


def test_equal_values_come_out_as_they_are(wing):
    """An average of equal values is that value, whatever was left out."""
    query, key, value = qkv(1, 2, 2, 30, 60, 16)
    value = value[:, :, :1].expand_as(value)
    out = wing.topk_attention_with_residual(query, key, value, 4)
    torch.testing.assert_close(out, value[:, :, :30])


def test_equal_scores_are_dense_attention(wing):
    """Where all keys weigh the same, the mean is exactly what was left out."""
    query, key, value = qkv(1, 2, 2, 30, 60, 16)
    out = wing.topk_attention_with_residual(query * 0, key, value, 4)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 5, 7, 4, 4), (2, 2, 1, 0, 7, 4, 4), (2, 2, 1, 5, 0, 4, 4)], ids=str
)
def test_nothing(wing, sizes):
    out = wing.topk_attention_with_residual(*qkv(*sizes), 3)
    assert out.shape == (*sizes[:2], sizes[3], 4)
    assert not out.any()


@pytest.mark.parametrize("name", CASES)
def test_gradient(wing, dtype, name):
    """That of the formula with the selection held fast, in float64."""
    sizes, top_k, options = CASES[name]
    inputs = [t.requires_grad_() for t in qkv(*sizes, dtype=dtype)]
    weights = torch.randn(*sizes[:2], sizes[3], sizes[6], dtype=torch.float64)
    ours = wing.topk_attention_with_residual(*inputs, top_k, **options)
    grads = torch.autograd.grad((ours.double() * weights.to(ours.device)).sum(), inputs)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    want = torch.autograd.grad((formula(*exact, top_k, **options) * weights).sum(), exact)
    # lse is float32 whatever the inputs are; half types round the output of the selection and its gradient
    rounding = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 3e-5)
    for grad, right, label in zip(grads, want, ("query", "key", "value"), strict=True):
        assert grad.dtype == dtype
        error = (grad.cpu().double() - right).abs().max().item()
        assert error <= rounding * right.abs().max().item() + 1e-6, (label, error)


def test_the_gradient_stores_no_matrix_and_has_no_second():
    query, key, value = (t.requires_grad_() for t in qkv(1, 2, 2, 64, 64, 4))
    stored = []

    def note(tensor):
        stored.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = sparse_attn.topk_attention_with_residual(query, key, value, 4, is_causal=True)
    assert max(stored) < 2 * 64 * 64
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention has first-order gradients only"):
        grad.sum().backward()


def test_torch_func():
    """vmap over calls, gradients of samples, forward mode along the gradient."""
    inputs = qkv(3, 2, 1, 12, 12, 8)
    each = [tuple(t[b : b + 1] for t in inputs) for b in range(3)]

    def loss(query, key, value):
        return sparse_attn.topk_attention_with_residual(query, key, value, 4, is_causal=True).square().sum()

    def gradient(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    batches = [t.unsqueeze(1) for t in inputs]
    ours = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batches)
    for one, wanted in zip(ours, zip(*map(gradient, *zip(*each, strict=True)), strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(wanted))
    torch.testing.assert_close(
        torch.func.vmap(loss)(*batches), torch.stack([loss(*sample) for sample in each])
    )
    _, along = torch.func.jvp(loss, inputs, inputs)
    wanted = sum((grad * t).sum() for grad, t in zip(gradient(*inputs), inputs, strict=True))
    torch.testing.assert_close(along, wanted, rtol=1e-4, atol=1e-4)


def test_compiles_with_its_gradient():
    torch.compiler.reset()
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 20, 20, 8)]

    def loss(*inputs):
        return sparse_attn.topk_attention_with_residual(*inputs, 4, is_causal=True).square().sum()

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(ours, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other)
