"""What the checks must let through: the other half of a good error."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.inputs import qkv

import sparse_attn

QUERY, KEY, VALUE = qkv(2, 4, 2, 5, 7, 8, 6)


def select(**options):
    return sparse_attn.topk_select(QUERY, KEY, **({"top_k": 3} | options), backend="reference")


@pytest.mark.parametrize("top_k", [np.int64(3), np.uint8(3), np.int32(3)], ids=repr)
def test_numpy_integers(top_k):
    assert torch.equal(select(top_k=top_k), select())


@pytest.mark.parametrize("top_k", [7, 8, 2**31, 2**40, 2**63 - 1])
def test_a_budget_beyond_the_keys(top_k):
    assert select(top_k=top_k).shape == (2, 4, 5, 7)


@pytest.mark.parametrize(
    "scale", [2, np.float32(0.5), np.float64(0.5), Fraction(1, 2), 1e-320, -3.0, 0], ids=repr
)
def test_real_numbers_as_scale(scale):
    assert torch.equal(select(scale=scale), select(scale=float(scale)))
    out = sparse_attn.gathered_attention(QUERY, KEY, VALUE, select(), scale=scale)
    assert torch.equal(out, sparse_attn.gathered_attention(QUERY, KEY, VALUE, select(), scale=float(scale)))


def test_the_default_scale():
    default = sparse_attn.topk_attention(QUERY, KEY, VALUE, 3)
    assert torch.equal(default, sparse_attn.topk_attention(QUERY, KEY, VALUE, 3, scale=1 / math.sqrt(8)))


def test_causal_without_an_offset_where_the_lengths_agree():
    query, key, _ = qkv(1, 2, 2, 6, 6, 4)
    default = sparse_attn.topk_select(query, key, 3, is_causal=True)
    assert torch.equal(default, sparse_attn.topk_select(query, key, 3, is_causal=True, causal_offset=0))


def test_a_window_of_zero_needs_no_diagonal():
    assert torch.equal(select(window=0, sinks=0), select())


def test_masks_that_agree_within_a_group():
    pairs = torch.arange(4).view(1, 4, 1, 1).expand(2, 4, 5, 7) > 1
    select(attn_mask=pairs, share="kv")
    select(attn_mask=torch.ones(2, 4, 5, 7, dtype=torch.bool), share="all")
    select(attn_mask=torch.ones(1, 4, 1, 7, dtype=torch.bool), share="all")


def test_lengths_at_both_ends():
    indices = select(key_lengths=torch.tensor([0, 7], dtype=torch.int32), top_k=7)
    assert bool((indices[0] == -1).all())
    assert bool((indices[1] == torch.arange(7)).all())


def test_parameters_and_subclasses():
    """nn.Parameter is a tensor as any other."""
    out = sparse_attn.topk_attention(torch.nn.Parameter(QUERY), torch.nn.Parameter(KEY), VALUE, 3)
    assert torch.equal(out, sparse_attn.topk_attention(QUERY, KEY, VALUE, 3))


def test_tensors_by_name():
    by_name = sparse_attn.topk_attention(top_k=3, value=VALUE, key=KEY, query=QUERY)
    assert torch.equal(by_name, sparse_attn.topk_attention(QUERY, KEY, VALUE, 3))
