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


def test_no_gradient():
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 9, 9, 4)]
    assert not sparse_attn.topk_attention_with_residual(*inputs, 3).requires_grad
