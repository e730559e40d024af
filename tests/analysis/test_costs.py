"""The counts against brute force and against PyTorch's own counter, and the published figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_attn.analysis import (
    Rates,
    Shape,
    block,
    crossover,
    dense,
    indexer,
    mlp,
    projections,
    published,
    topk,
)
from sparse_attn.nn import HeadApproximator, KeySelector

SHAPE = Shape(24, num_heads=4, head_dim=8, num_kv_heads=2, batch=3, layers=2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 24, 100])
def test_pairs_by_counting(is_causal, top_k):
    shape = Shape(24, is_causal=is_causal)
    visible = [i + 1 if is_causal else 24 for i in range(24)]
    assert shape.pairs == sum(visible)
    assert shape.kept(top_k) == sum(min(v, top_k) for v in visible)


def test_dense_and_projections_are_what_torch_counts():
    shape = Shape(24, num_heads=4, head_dim=8, batch=3, is_causal=False)
    stream, weight = torch.randn(3, 24, 32), torch.randn(32, 32)
    with FlopCounterMode(display=False) as projected:
        for _ in range(4):
            stream @ weight
    assert projections(shape).flops == projected.get_total_flops()
    q = torch.randn(3, 4, 24, 8)
    with FlopCounterMode(display=False) as attended:
        (q @ q.transpose(-1, -2)) @ q
    assert dense(shape).flops == attended.get_total_flops()


def test_exact_selection_halves_the_products_at_most():
    assert topk(SHAPE, 24).select_flops == dense(SHAPE).flops // 2
    assert topk(SHAPE, 24).attend_flops == dense(SHAPE).flops
    assert topk(SHAPE, 5, indices_given=True).flops == topk(SHAPE, 5).attend_flops
    long = Shape(10**7)
    assert 1.999 < dense(long).flops / topk(long, 64).flops < 2


def test_indexer_counts_and_parameters():
    cost = indexer(SHAPE, 5, heads=3, dim=4)
    assert cost.select_flops == (2 * 4 + 2) * 3 * SHAPE.pairs * 6
    assert cost.parameters == 32 * (3 * 4 + 4 + 3) * 2
    assert indexer(SHAPE, 5, groups=2).select_flops == 2 * indexer(SHAPE, 5).select_flops
    assert cost.memory == 4 * 3 * 24 * 5


def test_blocks_that_cover_all_keys_are_dense():
    assert block(SHAPE, 3, block_size=8, query_tile=8).attend_flops == dense(SHAPE).flops
    assert block(SHAPE, 2, block_size=8, query_tile=8).attend_flops < dense(SHAPE).flops


def test_small_networks_have_the_modules_parameters():
    shape = Shape(24, num_heads=4, head_dim=8)
    selector = KeySelector(8, 24, 5, num_heads=4, hidden=16)
    approximator = HeadApproximator(8, 5, num_heads=4, hidden=32)
    modules = sum(p.numel() for m in (selector, approximator) for p in m.parameters())
    assert mlp(shape, 5, selector_hidden=16, approximator_hidden=32).parameters == modules


@pytest.mark.parametrize("is_causal", [False, True])
def test_small_networks_of_the_published_width_never_pay(is_causal):
    for length in (64, 1024, 10**6):
        shape = Shape(length, is_causal=is_causal)
        assert mlp(shape, 8, selector_hidden=128, approximator_hidden=128).flops > dense(shape).flops


def test_memory_of_stored_scores():
    assert dense(SHAPE).memory == 0
    assert dense(SHAPE, stores_scores=True).memory == 3 * 4 * 24 * 24 * 4


def test_rates_take_the_slower_of_arithmetic_and_bytes():
    cost = dense(SHAPE)
    assert Rates(1e3, 1e12, 1e12).seconds(cost) == pytest.approx(cost.flops / 1e3)
    assert Rates(1e15, 1e3, 1e12).seconds(cost) == pytest.approx(cost.stream_bytes / 1e3)
    given = topk(SHAPE, 5, indices_given=True)
    slow_gather = Rates(1e15, 1e15, 1e3).seconds(given)
    assert slow_gather == pytest.approx(given.gather_bytes / 1e3)


@pytest.mark.parametrize("factor", [1.0, 3.0, 77.5])
def test_crossover_is_the_first_length(factor):
    found = crossover(lambda t: 10.0 * t, lambda t: float(t * t), factor=factor)
    assert found == next(t for t in range(1, 10_000) if t * t > factor * 10 * t)


def test_no_crossover():
    assert crossover(lambda t: 2.0 * t, lambda t: 1.0 * t) is None


@pytest.mark.parametrize("figure", published.figures(), ids=lambda f: f"{f.table}: {f.label}")
def test_published(figure):
    assert figure.agrees


@pytest.mark.parametrize("bad", [{"length": 0}, {"length": 4, "num_heads": 6, "num_kv_heads": 4}])
def test_bad_shapes(bad):
    with pytest.raises(ValueError, match=r"length|num_heads"):
        Shape(**bad)


def test_bad_options():
    with pytest.raises(ValueError, match="top_k"):
        topk(SHAPE, 0)
    with pytest.raises(TypeError, match="is_causal"):
        Shape(4, is_causal=1)
