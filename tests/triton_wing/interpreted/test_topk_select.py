"""topk_select in Triton, interpreted: every option, and every way through its candidates at sizes that take no time.

Integer inputs have exact scores, so the oracle's own indices are demanded, ties included; where heads share, the
best masses are.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compare import assert_best, assert_identical
from helpers.inputs import LAYOUTS, OPTIONS, integers, normal, options_for, with_scores

from sparse_attn.triton_kernels import topk_select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def sizes(monkeypatch):
    """Sets the kernel's sizes: small ones reach with few keys what large ones reach with many."""

    def choose(block_m=4, block_n=8, capacity=16, slack=0, cut_elements=32, programs=1):
        def configs(_element_size, _head_dim, budget, _amd, _heavy, _rows):
            assert capacity >= budget + slack + block_n
            return [topk_select.Config(block_m, block_n, capacity, slack, cut_elements, 1, 1, programs)]

        monkeypatch.setattr(topk_select, "configs", configs)

    return choose


SHARED = (
    "causal",
    "window_sinks",
    "negative_scale",
    "mask_keys",
    "starts_of_queries",
    "lengths_causal",
    "everything",
)


@pytest.mark.parametrize(
    ("name", "share"),
    [(n, "none") for n in OPTIONS] + [(n, ("kv", "all")[i % 2]) for i, n in enumerate(SHARED)],
)
def test_options(wing, name, share):
    """One dtype each: what an option does is the same in all."""
    number = list(OPTIONS).index(name)
    heads, kv_heads = [(4, 2), (2, 2), (2, 1)][number % 3]
    queries, keys = [(5, 21), (21, 5), (17, 17)][number % 3]
    dtype = DTYPES[number % 3]
    query = integers(2, heads, queries, 8, dtype=dtype, seed=number)
    key = integers(2, kv_heads, keys, 8, dtype=dtype, seed=number + 100)
    options = options_for(name, query, key, seed=number) | {"share": share}
    indices = wing.topk_select(query, key, 5, **options)
    exact = share == "none" or (share == "kv" and heads == kv_heads)
    (assert_identical if exact else assert_best)(indices, query, key, 5, **options)


@pytest.mark.parametrize("name", ["window_sinks", "everything", "mask", "lengths", "starts_of_queries"])
def test_options_in_small_tiles(wing, sizes, name):
    """More than one tile of queries and of keys, and rows that are cut while forced keys are in them."""
    query, key = integers(2, 1, 11, 8, seed=1), integers(2, 1, 37, 8, seed=2)
    options = options_for(name, query, key)
    sizes(capacity=16, slack=2)
    assert_identical(wing.topk_select(query, key, 6, **options), query, key, 6, **options)


@pytest.mark.parametrize("dim", [1, 8, 16, 64, 72])
def test_head_dimensions(wing, dtype, dim):
    query, key = integers(1, 2, 5, dim, dtype=dtype), integers(1, 1, 40, dim, dtype=dtype, seed=1)
    assert_identical(wing.topk_select(query, key, 7), query, key, 7)


@pytest.mark.parametrize("length", [1, 8, 15, 16, 17, 25, 33])
def test_lengths_about_the_capacity(wing, sizes, length):
    """Rows that just fit, and rows that do not, with every budget's first and last case."""
    sizes(capacity=16)
    query, key = integers(1, 1, min(length, 9), 4), integers(1, 1, length, 4, seed=1)
    options = {"is_causal": True, "causal_offset": length - query.shape[2]}
    for top_k in (3, 8):
        assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


def test_budget_beyond_the_keys(wing):
    query, key = integers(1, 2, 9, 4), integers(1, 2, 9, 4, seed=1)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(9, 9) < 0.5}):
        assert_identical(wing.topk_select(query, key, 2**62, **options), query, key, 2**62, **options)


ORDERS = {
    "ascending": torch.arange(90),  # every score beats the threshold: each stretch overflows
    "descending": torch.arange(90).flip(0),
    "plateau": torch.full((90,), 7),
    "two values": torch.arange(90) * 7 // 3 % 2,
    "steps": torch.arange(90) // 20,
    "one winner last": (torch.arange(90) == 89).long(),
    "late winners": (torch.arange(90) > 70).long(),
    "zigzag": torch.arange(90) * 37 % 90,
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders(wing, sizes, order):
    query, key = with_scores(ORDERS[order], 8, torch.float32)
    query = query * torch.tensor([1.0, -1.0, 0.0]).view(1, 1, 3, 1)
    for top_k, slack in ((1, 0), (5, 3), (8, 0)):
        sizes(capacity=16, slack=slack)
        assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


@pytest.mark.parametrize("order", ["steps"])
def test_candidates_beyond_the_registers(wing, sizes, order):
    """Rows that are cut by reading them from memory again and again."""
    query, key = with_scores(ORDERS[order], 8, torch.float32)
    key = key[:, :, ::2]
    sizes(capacity=32, cut_elements=16)
    options = {"is_causal": True, "causal_offset": 43, "window": 3, "sinks": 2}
    assert_identical(wing.topk_select(query, key, 9, **options), query, key, 9, **options)


@pytest.mark.parametrize(("share", "packed"), [("none", False), ("none", True), ("all", True)])
def test_keys_split_over_programs(wing, sizes, share, packed):
    """Few queries and many keys: pieces of the keys, then a merge."""
    starts = torch.tensor([[0, 40, 590], [500, 7, 19]]) if packed else None
    sizes(programs=8, capacity=32, block_n=16, cut_elements=256)
    query, key = integers(2, 1, 3, 8), integers(2, 1, 600, 8, seed=1)
    if share == "all":
        query = query.expand(2, 2, 3, 8)
    options = {"key_lengths": torch.tensor([600, 20]), "share": share}
    options |= {"is_causal": True, "causal_offset": 580, "window": 1, "sinks": 1, "key_starts": starts}
    indices = wing.topk_select(query, key, 3, **options)
    (assert_identical if share == "none" else assert_best)(indices, query, key, 3, **options)
    assert topk_select._splits(2, 16, 600, 3, 16)[0] > 1


def test_special_scores(wing, sizes):
    """−0 and +0 are equal, −inf comes last of the visible, +inf before all numbers, NaN of either sign before it."""
    scores = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 2.0, -0.0, 0.0] * 3
    )
    key = torch.zeros(1, 1, len(scores), 1)
    key[0, 0, :, 0] = scores
    query = torch.ones(1, 1, 1, 1)
    for top_k in (1, 6, 16):
        sizes(capacity=64, cut_elements=256)
        assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)
        if top_k == 6:
            sizes(capacity=16)
            assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_nan_and_infinity_as_the_reference_has_them(wing, share):
    import sparse_attn

    query, key = integers(1, 4, 9, 4), integers(1, 2, 33, 4, seed=1)
    query[0, 1, 3] = math.nan
    key[0, 0, 7, 2] = math.nan
    key[0, 1, 20, 1] = math.inf
    options = {"is_causal": True, "causal_offset": 20, "share": share, "window": 2, "sinks": 1}
    want = sparse_attn.topk_select(query, key, 6, backend="reference", **options)
    indices = wing.topk_select(query, key, 6, **options)
    same = (indices == want).all(-1)
    # Where heads share, masses of finite scores differ by rounding; a row with NaN in a query keeps the first keys.
    assert bool(same.all()) if share == "none" else bool(same[0, :, 3].all())
    assert torch.equal((indices == 7).any(-1), (want == 7).any(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(wing, layout):
    dtype = DTYPES[list(LAYOUTS).index(layout) % 3]
    query = LAYOUTS[layout](integers(2, 2, 5, 8, dtype=dtype))
    key = LAYOUTS[layout](integers(2, 1, 21, 8, dtype=dtype, seed=1))
    assert_identical(wing.topk_select(query, key, 4), query, key, 4)


def test_masks_of_every_stride(wing):
    query, key = integers(2, 2, 7, 4), integers(2, 2, 22, 4, seed=1)
    big = torch.rand(2, 2, 30, 50) < 0.6
    for mask in (big[:, :, 3:10, 2:46:2], big[:1, :1, 5:6, 7:29], big[0, 0, :22, :7].mT, torch.tensor(True)):
        options = {"attn_mask": mask}
        assert_identical(wing.topk_select(query, key, 4, **options), query, key, 4, **options)


def test_normal_scores(wing, sizes):
    """Rounding and all, and twice the same."""
    query, key = normal(1, 2, 5, 16), normal(1, 1, 50, 16, seed=1)
    for share in ("all", "none"):
        options = {"share": share, "is_causal": True, "causal_offset": 45}
        found = wing.topk_select(query, key, 6, **options)
        assert_best(found, query, key, 6, **options)
        assert torch.equal(found, wing.topk_select(query, key, 6, **options))
    sizes(capacity=16, slack=1)  # sizes change nothing
    assert torch.equal(found, wing.topk_select(query, key, 6, **options))
