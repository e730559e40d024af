"""nn.LowRankScorer: exact at full rank, optimal below it, and the same after saving and with cached keys."""

from __future__ import annotations

import pytest
import torch

import sparse_attn
from sparse_attn.nn import LowRankScorer


def skewed(*shape: int, seed: int) -> torch.Tensor:
    """Numbers whose components differ in size and hang together, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[1], shape[-1], shape[-1], generator=generator) * torch.logspace(0, -2, shape[-1])
    return torch.randn(shape, generator=generator) @ mix.mT


def both(heads=4, kv_heads=2, length=200, dim=16):
    return skewed(1, heads, length, dim, seed=1), skewed(1, kv_heads, length, dim, seed=2)


def products(query, key):
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT


def test_full_rank_changes_nothing():
    query, key = both()
    scorer = LowRankScorer(2, 16, 16).calibrate(query, key).fit()
    want = products(query, key)
    torch.testing.assert_close(
        products(scorer.queries(query), scorer.keys(key)),
        want,
        rtol=1e-3,
        atol=1e-4 * want.abs().max().item(),
    )
    ours = scorer.select(query, key, 20, is_causal=True)
    exact = sparse_attn.topk_select(query, key, 20, is_causal=True)
    assert (ours == exact).double().mean() > 0.99


def test_the_error_is_the_smallest_there_is():
    """Of all rank-r products the mean squared error over all pairs is that of the truncated decomposition."""
    query, key = both(2, 2)
    for rank in (1, 4, 9):
        scorer = LowRankScorer(2, 16, rank).calibrate(query, key).fit()
        error = (
            (products(scorer.queries(query), scorer.keys(key)) - products(query, key)).square().sum((0, 2, 3))
        )
        best = torch.linalg.svdvals(products(query, key)[0])[:, rank:].square().sum(-1)
        torch.testing.assert_close(
            error, best, rtol=1e-2, atol=1e-3 * products(query, key).square().sum().item() / 400
        )


def test_calibrates_in_parts():
    query, key = both()
    whole = LowRankScorer(2, 16, 5).calibrate(query, key).fit()
    parts = LowRankScorer(2, 16, 5)
    for rows in (slice(0, 50), slice(50, 200)):
        parts.calibrate(query[:, :, rows], key[:, :, rows])
    parts.fit()
    assert torch.equal(whole.select(query, key, 9), parts.select(query, key, 9))


def test_saved_and_cached():
    query, key = both()
    scorer = LowRankScorer(2, 16, 5).calibrate(query, key).fit()
    other = LowRankScorer(2, 16, 5)
    other.load_state_dict(scorer.state_dict())
    options = {"is_causal": True, "window": 3, "sinks": 1, "share": "kv"}
    want = scorer.select(query, key, 9, **options)
    assert torch.equal(other.select(query, None, 9, keys=scorer.keys(key), **options), want)
    default = scorer.select(query, key, 9, share="all", scale=None)
    assert torch.equal(default, scorer.select(query, key, 9, share="all", scale=0.25))


def test_rounded():
    query, key = both()
    exact = LowRankScorer(2, 16, 8).calibrate(query, key).fit()
    rounded = LowRankScorer(2, 16, 8, int8=True)
    rounded.load_state_dict(exact.state_dict())
    one, two = exact.select(query, key, 20), rounded.select(query, key, 20)
    assert 0.8 < (one.unsqueeze(-1) == two.unsqueeze(-2)).any(-1).double().mean() < 1


def test_unseen_directions_and_half_types():
    """Keys that live in two dimensions need no more; bfloat16 in, finite projections out."""
    query, key = both()
    key = key * (torch.arange(16) < 2)
    scorer = LowRankScorer(2, 16, 2).calibrate(query.bfloat16(), key.bfloat16()).fit()
    assert bool(scorer.key_projection.isfinite().all())
    want = products(query, key)
    error = products(scorer.queries(query), scorer.keys(key)) - want
    assert error.norm() < 0.02 * want.norm()
    assert scorer.select(query.bfloat16(), key.bfloat16(), 4).shape == (1, 4, 200, 4)


def test_errors():
    query, key = both()
    scorer = LowRankScorer(2, 16, 4)
    with pytest.raises(RuntimeError, match="needs calibrate"):
        scorer.fit()
    with pytest.raises(RuntimeError, match="needs fit"):
        scorer.select(query, key, 3)
    scorer.calibrate(query, key).fit()
    with pytest.raises(ValueError, match="one of them"):
        scorer.select(query, None, 3)
    with pytest.raises(ValueError, match="for 2 key heads of width 16, got 4 of width 16"):
        scorer.select(query, query, 3)
    with pytest.raises(ValueError, match="rank must be at most 16"):
        LowRankScorer(2, 16, 17)
