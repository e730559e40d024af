"""No less exact than PyTorch: |ours − fp64| ≤ 1.5 · |PyTorch in the same dtype − fp64| + ε."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_within_budget, pytorch_attention, pytorch_steps
from helpers.inputs import normal, qkv

# float64 has no exacter judge here.
pytestmark = pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)

SHAPES = {  # (B, Hq, Hkv, Tq, Tk, D, Dv, K), the factor of the query
    "small": ((2, 4, 4, 32, 32, 16, 16, 8), 1.0),
    "usual": ((1, 4, 4, 64, 256, 64, 64, 64), 1.0),
    "grouped": ((1, 8, 2, 48, 96, 64, 64, 32), 1.0),
    "one key head": ((1, 6, 1, 33, 70, 40, 24, 20), 1.0),
    "wide": ((1, 2, 2, 20, 65, 256, 256, 33), 1.0),
    "odd": ((1, 3, 3, 37, 53, 7, 72, 17), 1.0),
    "long rows": ((1, 2, 1, 8, 1500, 32, 32, 1000), 1.0),
    "tiles of queries": ((1, 2, 1, 700, 700, 64, 64, 24), 1.0),
    "peaked": ((1, 4, 4, 40, 120, 64, 64, 64), 8.0),
    "flat": ((1, 4, 4, 40, 120, 64, 64, 64), 0.01),
}


def case(name: str, dtype: torch.dtype):
    (batch, heads, kv_heads, queries, keys, dim, value_dim, width), factor = SHAPES[name]
    query, key, value = qkv(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype=dtype)
    query = query * factor
    indices = oracle.topk_select(query, key, width)
    return (query, key, value), indices


def yardsticks(wing, dtype: torch.dtype) -> list:
    """PyTorch's fused kernel; in float32 for the reference its single steps too, of which the reference is made.

    Which of the two is the more exact differs from CPU to CPU, as their sums run in other orders. How exact the
    reference has to be on any is for the tests of gathered_attention to say, whose bound is absolute.
    """
    steps = wing.name == "reference" and dtype == torch.float32
    return [pytorch_attention, pytorch_steps] if steps else [pytorch_attention]


@pytest.mark.parametrize("name", SHAPES)
def test_forward(wing, dtype, name):
    inputs, indices = case(name, dtype)
    out, lse = wing.gathered_attention(*inputs, indices, return_lse=True)
    exact, exact_lse = oracle.gathered_attention(*inputs, indices)
    first, *more = (attention(*inputs, indices) for attention in yardsticks(wing, dtype))
    assert_within_budget(out, first, exact, "out", *more)
    # PyTorch's own steps to the LSE; of half types in float32, as the LSE is float32.
    query, key, _ = (t.float() for t in inputs)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT) * query.shape[3] ** -0.5
    theirs = scores.masked_fill(oracle.multiplicity(query, key, indices) == 0, -torch.inf).logsumexp(-1)
    assert_within_budget(lse, theirs, exact_lse, "lse")


@pytest.mark.parametrize("name", SHAPES)
def test_backward(wing, dtype, name):
    inputs, indices = case(name, dtype)
    grad = normal(*inputs[0].shape[:3], inputs[2].shape[3], dtype=dtype, seed=99)
    gradients = []
    for attention in (wing.gathered_attention, *yardsticks(wing, dtype)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        gradients.append(torch.autograd.grad(attention(*leaves, indices), leaves, grad))
    exact = oracle.gradients(*inputs, indices, grad)
    for tensor, true, ours, theirs, *more in zip(("query", "key", "value"), exact, *gradients, strict=True):
        assert_within_budget(ours, theirs, true, f"gradient of {tensor}", *more)


@pytest.mark.parametrize("name", ["usual", "grouped", "odd"])
def test_fused(wing, dtype, name):
    """The fused op stays within the same budget as gathered_attention, forward and backward."""
    inputs, indices = case(name, dtype)
    leaves = [t.clone().requires_grad_() for t in inputs]
    out, chosen = wing.topk_attention(*leaves, indices.shape[3], return_indices=True)
    grad = normal(*out.shape, dtype=dtype, seed=99)
    exact = [oracle.gathered_attention(*inputs, chosen)[0], *oracle.gradients(*inputs, chosen, grad)]
    results = [[out, *torch.autograd.grad(out, leaves, grad)]]
    for attention in yardsticks(wing, dtype):
        leaves = [t.clone().requires_grad_() for t in inputs]
        dense = attention(*leaves, chosen)
        results.append([dense, *torch.autograd.grad(dense, leaves, grad)])
    names = ("out", "gradient of query", "gradient of key", "gradient of value")
    for name, true, ours, theirs, *more in zip(names, exact, *results, strict=True):
        assert_within_budget(ours, theirs, true, name, *more)
