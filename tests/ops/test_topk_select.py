"""topk_select against the oracle: exact inputs give the oracle's own indices, others the best scores."""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_best, assert_identical
from helpers.inputs import OPTIONS, integers, mask, normal, options_for

HEADS = [(3, 3), (4, 2), (3, 1)]  # (Hq, Hkv): one per head, grouped, one for all
LENGTHS = [(17, 17), (9, 33), (33, 9), (16, 64)]


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_exact_scores(wing, dtype, name, share):
    options_on_exact_scores(wing, dtype, name, share, range(4))


def options_on_exact_scores(wing, dtype, name, share, numbers):
    for number in numbers:
        queries, keys = LENGTHS[number]
        heads, kv_heads = HEADS[number % len(HEADS)]
        query = integers(2, heads, queries, 7, dtype=dtype, seed=number)
        key = integers(2, kv_heads, keys, 7, dtype=dtype, seed=number + 100)
        options = options_for(name, query, key, seed=number) | {"share": share}
        indices = wing.topk_select(query, key, 5, **options)
        exact = share == "none" or (share == "kv" and heads == kv_heads)
        (assert_identical if exact else assert_best)(indices, query, key, 5, **options)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_normal_scores(wing, dtype, name, share):
    options_on_normal_scores(wing, dtype, name, share, range(2))


def options_on_normal_scores(wing, dtype, name, share, numbers):
    for number in numbers:
        queries, keys = LENGTHS[1 + number]
        heads, kv_heads = HEADS[number % len(HEADS)]
        seed = number + 10 * list(OPTIONS).index(name)
        query = normal(2, heads, queries, 20, dtype=dtype, seed=seed)
        key = normal(2, kv_heads, keys, 20, dtype=dtype, seed=seed + 1000)
        options = options_for(name, query, key, seed=seed) | {"share": share}
        assert_best(wing.topk_select(query, key, 6, **options), query, key, 6, **options)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 16, 31, 33, 64, 72, 128, 200, 256])
def test_head_dimensions(wing, dtype, dim):
    query, key = integers(1, 2, 19, dim, dtype=dtype), integers(1, 2, 50, dim, dtype=dtype, seed=1)
    assert_identical(wing.topk_select(query, key, 9), query, key, 9)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000])
def test_lengths(wing, dtype, length):
    queries = min(length, 65)
    query = integers(1, 2, queries, 5, dtype=dtype)
    key = integers(1, 1, length, 5, dtype=dtype, seed=1)
    options = {"is_causal": True, "causal_offset": length - queries}
    for top_k in {1, 8, length // 2 + 1, length + 1}:
        assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


@pytest.mark.parametrize(
    "top_k", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 200, 255, 256]
)
def test_budgets(wing, dtype, top_k):
    query, key = integers(1, 2, 5, 4, dtype=dtype), integers(1, 2, 256, 4, dtype=dtype, seed=1)
    assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


@pytest.mark.parametrize("offset", [-(10**12), -40, -39, -1, 0, 1, 24, 25, 10**12])
@pytest.mark.parametrize("window", [0, 1, 6])
def test_causal_offsets(wing, offset, window):
    query, key = integers(1, 2, 40, 6), integers(1, 1, 25, 6, seed=1)
    options = {"is_causal": True, "causal_offset": offset, "window": window, "sinks": 1}
    assert_identical(wing.topk_select(query, key, 7, **options), query, key, 7, **options)


def test_budgets_larger_than_any_key_count(wing):
    query, key = integers(1, 1, 9, 4), integers(1, 1, 9, 4, seed=1)
    for options in ({}, {"is_causal": True, "window": 10**15, "sinks": 10**15}):
        indices = wing.topk_select(query, key, 2**62, **options)
        assert_identical(indices, query, key, 2**62, **options)


@pytest.mark.parametrize("scale", [None, 1.0, 1e-3, 1e-30, 250.0, -1.0, -1e-3, 0.0])
def test_scales(wing, dtype, scale):
    """A positive scale changes nothing, a negative one turns the order round, and 0 makes every key equal."""
    query, key = integers(1, 2, 12, 8, dtype=dtype), integers(1, 2, 40, 8, dtype=dtype, seed=1)
    assert_identical(wing.topk_select(query, key, 11, scale=scale), query, key, 11, scale=scale)


def test_mask_per_head(wing, dtype):
    query, key = integers(2, 4, 14, 6, dtype=dtype), integers(2, 2, 22, 6, dtype=dtype, seed=1)
    options = {"attn_mask": mask(2, 4, 14, 22)}
    assert_identical(wing.topk_select(query, key, 4, **options), query, key, 4, **options)
    # The same mask for the heads that share, given per head, by a copy and by a view.
    per_kv_head = mask(2, 2, 14, 22, seed=1)
    for shared in (
        per_kv_head.repeat_interleave(2, 1),
        per_kv_head.unsqueeze(2).expand(2, 2, 2, 14, 22).flatten(1, 2),
    ):
        options = {"attn_mask": shared, "share": "kv"}
        assert_best(wing.topk_select(query, key, 4, **options), query, key, 4, **options)


@pytest.mark.parametrize(
    "shape", [(), (22,), (1, 22), (14, 1), (4, 1, 1), (2, 1, 14, 22), (2, 4, 1, 22)], ids=str
)
def test_mask_broadcasts(wing, shape):
    query, key = integers(2, 4, 14, 6), integers(2, 2, 22, 6, seed=1)
    options = {"attn_mask": mask(*shape) if shape else torch.tensor(True)}
    assert_identical(wing.topk_select(query, key, 4, **options), query, key, 4, **options)


def test_mask_strides(wing):
    """The mask is read through its strides: transposed, sliced, broadcast."""
    query, key = integers(2, 2, 14, 6), integers(2, 2, 22, 6, seed=1)
    big = mask(2, 2, 30, 50)
    for view in (mask(2, 2, 22, 14).mT, big[:, :, 3:17, 2:46:2], big[:1, :1, 5:6, 7:29]):
        options = {"attn_mask": view}
        assert_identical(wing.topk_select(query, key, 4, **options), query, key, 4, **options)


@pytest.mark.parametrize("share", ["kv", "all"])
def test_shared_ties_go_to_the_smaller_index(wing, dtype, share):
    """Heads that share and ask the same question rank keys as one head does: equal scores have equal mass."""
    query = integers(1, 1, 21, 5, dtype=dtype, largest=2).expand(1, 4, 21, 5)
    key = integers(1, 1, 70, 5, dtype=dtype, largest=2, seed=1).expand(1, 2, 70, 5)
    for top_k in (1, 8, 33):
        indices = wing.topk_select(query, key, top_k, is_causal=True, causal_offset=49, share=share)
        alone = wing.topk_select(query[:, :1], key[:, :1], top_k, is_causal=True, causal_offset=49)
        assert torch.equal(indices, alone.expand_as(indices))


def test_shared_mass_is_summed_over_heads(wing):
    """Two heads: one is certain of key 3, one spreads over 0 and 1. Mass ranks 3 first, then 0 and 1."""
    key = torch.eye(4).view(1, 1, 4, 4)
    query = torch.tensor([[0.0, 0.0, 0.0, 30.0], [9.0, 8.9, 0.0, 0.0]]).view(1, 2, 1, 4)
    assert wing.topk_select(query, key, 1, scale=1.0, share="all").tolist() == [[[[3]]]]
    assert wing.topk_select(query, key, 2, scale=1.0, share="kv").tolist() == [[[[0, 3]]]]
    assert wing.topk_select(query, key, 3, scale=1.0, share="kv").tolist() == [[[[0, 1, 3]]]]


def test_selection_is_not_differentiated(wing):
    query, key = normal(1, 2, 6, 4).requires_grad_(), normal(1, 2, 6, 4, seed=1).requires_grad_()
    assert not wing.topk_select(query, key, 3).requires_grad
