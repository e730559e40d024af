"""topk_select on long rows whose order is the worst for a scan that keeps a running threshold."""

from __future__ import annotations

import pytest
import torch
from helpers.compare import assert_best, assert_identical
from helpers.inputs import integers, normal, with_scores

LENGTH = 5003

ORDERS = {
    "ascending": torch.arange(LENGTH),
    "descending": torch.arange(LENGTH).flip(0),
    "plateau": torch.full((LENGTH,), 7),
    "steps": torch.arange(LENGTH) // 500,
    "steps_down": (LENGTH - torch.arange(LENGTH)) // 500,
    "zigzag": torch.arange(LENGTH) * 2617 % LENGTH,
    "late_winners": (torch.arange(LENGTH) > LENGTH - 40) * 9,
    "one_winner_last": (torch.arange(LENGTH) == LENGTH - 1).long(),
    "almost_all_tied_at_the_top": (torch.arange(LENGTH) % 100 != 0).long(),
    "few_values": torch.arange(LENGTH) * 7919 % 5,
    "bumps": (torch.arange(LENGTH) % 640 - 320).abs(),
}


@pytest.mark.parametrize("top_k", [1, 64, 300, 1000, 4096])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(wing, dtype, order, top_k):
    query, key = with_scores(ORDERS[order], 8, dtype)
    for sign in (1.0, -1.0):
        indices = wing.topk_select(query, key, top_k, scale=sign)
        assert_identical(indices, query, key, top_k, scale=sign)


@pytest.mark.parametrize("order", ["ascending", "descending", "plateau", "zigzag"])
def test_many_queries_on_sorted_scores(wing, order):
    """Tiles of queries: each query sees the sorted keys at another length and with another sign or factor."""
    scores = ORDERS[order][:1000]
    query, key = with_scores(scores, 6, torch.float32)
    factors = integers(1, 2, 130, 1, largest=2)
    query = factors * query
    options = {"is_causal": True, "causal_offset": 870}
    for top_k in (5, 64, 300):
        assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


@pytest.mark.parametrize("top_k", [8, 300, 1000])
def test_causal_rows_of_every_length(wing, top_k):
    """1200 queries, of which each sees one key more than the one before."""
    query, key = integers(1, 1, 1200, 3), integers(1, 1, 1200, 3, seed=1)
    options = {"is_causal": True, "window": 5, "sinks": 3}
    assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


@pytest.mark.parametrize("top_k", [1, 64, 1000])
def test_normal_scores(wing, dtype, top_k):
    query, key = normal(1, 2, 6, 64, dtype=dtype), normal(1, 1, LENGTH, 64, dtype=dtype, seed=1)
    assert_best(wing.topk_select(query, key, top_k), query, key, top_k)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_many_rows_of_normal_scores(wing, dtype, share):
    """Close races by the hundred: a rounding of the query to half precision anywhere loses some of them."""
    query, key = normal(1, 4, 300, 48, dtype=dtype), normal(1, 2, 700, 48, dtype=dtype, seed=1)
    options = {"share": share, "is_causal": True, "causal_offset": 400}
    assert_best(wing.topk_select(query, key, 50, **options), query, key, 50, **options)


@pytest.mark.parametrize("share", ["kv", "all"])
def test_shared_mass_over_long_rows(wing, dtype, share):
    query, key = normal(1, 4, 5, 16, dtype=dtype), normal(1, 2, 3001, 16, dtype=dtype, seed=1)
    options = {"share": share, "is_causal": True, "causal_offset": 2996, "window": 10, "sinks": 4}
    for top_k in (20, 700):
        assert_best(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


def test_scores_in_one_narrow_band(wing):
    """All scores within a few units in the last place of each other: a histogram of values sees one bin."""
    key = 1 + torch.randint(0, 9, (1, 1, LENGTH, 1), generator=torch.Generator().manual_seed(0)) * 2.0**-23
    query = torch.ones(1, 1, 1, 1)
    for top_k in (10, 1000):
        assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


def test_scores_over_the_whole_exponent_range(wing):
    """From 2^-100 to 2^100, both signs: every magnitude counts, not only the largest."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 101, (1, 1, LENGTH, 1), generator=generator)
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    key, query = signs * torch.exp2(exponents.float()), torch.ones(1, 1, 1, 1)
    for top_k in (10, 1000, 4000):
        assert_identical(wing.topk_select(query, key, top_k, scale=1.0), query, key, top_k, scale=1.0)
