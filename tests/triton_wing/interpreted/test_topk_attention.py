"""topk_attention in Triton, interpreted: the fused forward against the oracle, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import LAYOUTS, integers, normal, options_for, qkv

FLAGS = {"return_lse": True, "return_indices": True}
# Selection and attention have all options in tests of their own.
TOGETHER = ("plain", "mask_2d", "lengths_causal", "starts_of_queries", "negative_scale", "everything")


@pytest.mark.parametrize("name", TOGETHER)
def test_against_the_oracle(wing, name):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[TOGETHER.index(name) % 3]
    inputs = qkv(2, 4, 2, 7, 21, 9, 5, dtype=dtype, make=integers, seed=1)
    options = options_for(name, *inputs[:2])
    out, lse, indices = wing.topk_attention(*inputs, 7, **FLAGS, **options)
    want, want_lse, want_indices = oracle.topk_attention(*inputs, 7, **options)
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_is_select_then_attend(wing, share):
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 5, 19, 8, 12, make=integers)]
    options = {"is_causal": True, "causal_offset": 14, "window": 2, "sinks": 1, "share": share}
    out, lse, indices = wing.topk_attention(*inputs, 6, **FLAGS, **options)
    assert torch.equal(indices, wing.topk_select(*inputs[:2], 6, **options))
    staged, staged_lse = wing.gathered_attention(*inputs, indices, return_lse=True)
    assert_close(out, staged, "out")
    assert_close(lse, staged_lse, "lse", units=4)
    grad = normal(*out.shape, seed=9)
    ours, want = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(staged, inputs, grad)
    for mine, true in zip(ours, want, strict=True):
        assert_close(mine, true, "gradient")


@pytest.mark.parametrize("budget", [1, 16, 70, 300])
def test_budgets(wing, budget):
    inputs = qkv(1, 1, 1, 2, 80, 8, 72)
    out, lse, indices = wing.topk_attention(*inputs, budget, **FLAGS)
    want, want_lse, _ = oracle.topk_attention(*inputs, budget)
    assert indices.shape[3] == min(budget, 80)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)


def test_keys_split_over_programs(wing, monkeypatch):
    """The scores come through the merge."""
    from sparse_attn.triton_kernels import topk_select

    config = topk_select.Config(8, 8, 16, 0, 64, 1, 1, 8)
    monkeypatch.setattr(topk_select, "configs", lambda *_: [config])
    inputs = qkv(1, 2, 1, 1, 300, 8, make=integers)
    options = {"is_causal": True, "causal_offset": 290, "window": 1}
    out, lse, indices = wing.topk_attention(*inputs, 3, **FLAGS, **options)
    want, want_lse, want_indices = oracle.topk_attention(*inputs, 3, **options)
    assert torch.equal(indices, want_indices)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(wing, layout):
    inputs = [LAYOUTS[layout](t) for t in qkv(2, 2, 1, 3, 11, 8, 6, make=integers)]
    out, lse, _ = wing.topk_attention(*inputs, 4, **FLAGS)
    want, want_lse, _ = oracle.topk_attention(*inputs, 4)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse", units=4)


def test_rows_that_see_nothing(wing):
    inputs = qkv(2, 1, 1, 4, 6, 8)
    out, lse, indices = wing.topk_attention(*inputs, 3, key_lengths=torch.tensor([0, 4]), **FLAGS)
    assert not out[0].any()
    assert bool((lse[0] == -math.inf).all())
    assert bool((indices[0] == -1).all())
    assert bool(out[1].isfinite().all())
    empty = qkv(1, 2, 1, 4, 0, 8)
    out, lse, indices = wing.topk_attention(*empty, 3, **FLAGS)
    assert indices.shape == (1, 2, 4, 0)
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_special_values(wing, bad):
    """In a key: NaN and +inf make NaN of the rows that see it, −inf has weight 0. Behind the length: nothing."""
    query, key, value = qkv(1, 1, 1, 6, 20, 4)
    query = query.abs() + 1
    key[0, 0, 9, 1] = bad
    out, lse, indices = wing.topk_attention(query, key, value, 3, **FLAGS)
    if bad == -math.inf:
        want = oracle.topk_attention(query, key.nan_to_num(neginf=-1e9), value, 3)
        assert torch.equal(indices, want[2])
        assert_close(out, want[0], "out")
    else:
        assert bool((indices == 9).any(-1).all())
        assert bool(out.isnan().all())
        assert not bool(lse.isfinite().any())
    value[0, 0, 9:] = bad
    lengths = {"key_lengths": torch.tensor([9])}
    hidden = wing.topk_attention(query, key, value, 3, **lengths)
    clean = wing.topk_attention(query, key.nan_to_num(0, 0, 0), value.nan_to_num(0, 0, 0), 3, **lengths)
    assert torch.equal(hidden, clean)
