"""Choices of keys without learning: the contract of the indices, and that each is what its name says."""

import pytest
import torch
from helpers import compare, oracle

from distillation.models import BATCH, LENGTH, Teacher, batches
from sparse_attn.distillation import Frequencies, baselines, observe
from sparse_attn.nn import KeySelector

NAME = "blocks.1.attention"  # six heads that share two key heads
BUDGETS = [1, 5, LENGTH, 3 * LENGTH]


@pytest.fixture(scope="module")
def teacher():
    return Teacher()


@pytest.fixture(scope="module")
def frequencies(teacher):
    return Frequencies(teacher, batches(3))


@pytest.fixture
def heads(teacher):
    return observe(teacher, batches(1, seed=9)[0]).layers[NAME]


def choosers(frequencies):
    selector = KeySelector(4, LENGTH, 3, num_heads=6)
    return {
        "exact": baselines.exact,
        "recent": baselines.recent,
        "random": baselines.random(0),
        "learned": baselines.learned({NAME: selector}),
        "positions": frequencies.positions,
        "distances": frequencies.distances,
    }


@pytest.mark.parametrize("top_k", BUDGETS)
@pytest.mark.parametrize("chooser", ["exact", "recent", "random", "learned", "positions", "distances"])
def test_contract(heads, frequencies, chooser, top_k):
    indices = choosers(frequencies)[chooser](NAME, heads, top_k)
    shared = "all" if indices.shape[1] == 1 else "none"
    compare.assert_well_formed(
        indices.contiguous(), heads.query, heads.key, top_k, is_causal=True, share=shared
    )


@pytest.mark.parametrize("top_k", BUDGETS)
def test_recent(heads, top_k):
    want = oracle.topk_select(
        heads.query, heads.key, min(top_k, LENGTH), is_causal=True, window=min(top_k, LENGTH), share="all"
    )
    assert torch.equal(baselines.recent(NAME, heads, top_k), want)


def test_random_follows_its_seed_and_is_even(heads):
    first = baselines.random(1)(NAME, heads, 4)
    assert torch.equal(first, baselines.random(1)(NAME, heads, 4))
    assert not torch.equal(first, baselines.random(2)(NAME, heads, 4))
    last = torch.stack([baselines.random(seed)(NAME, heads, 6)[0, 0, -1] for seed in range(400)])
    counts = torch.bincount(last.flatten(), minlength=LENGTH) / 400  # a quarter each, give or take 0.02
    assert (counts - 6 / LENGTH).abs().max() < 0.1


def test_frequencies_are_the_means(teacher, frequencies):
    position, distance = torch.zeros(2, 6, LENGTH, dtype=torch.float64)
    seen = torch.zeros(LENGTH, dtype=torch.float64)
    for ids in batches(3):
        heads = observe(teacher, ids).layers[NAME]
        visible = oracle.visible(heads.query, heads.key, is_causal=True)
        mass = oracle.scores(heads.query, heads.key).masked_fill(~visible, -torch.inf).softmax(-1)
        for i in range(LENGTH):
            for j in range(i + 1):
                position[:, j] += mass[:, :, i, j].sum(0)
                distance[:, i - j] += mass[:, :, i, j].sum(0)
                seen[j] += BATCH
    torch.testing.assert_close(frequencies.by_position[NAME], position / seen, rtol=1e-4, atol=1e-6)
    seen_at = 3 * BATCH * (LENGTH - torch.arange(LENGTH))  # queries that have a key so far back
    torch.testing.assert_close(frequencies.by_distance[NAME], distance / seen_at, rtol=1e-4, atol=1e-6)


def test_they_choose_the_most_frequent(heads, frequencies):
    table = frequencies.by_distance[NAME]
    indices = frequencies.distances(NAME, heads, 3)
    want = table[2, :16].topk(3).indices  # distances that the query at 15 has
    assert sorted(15 - indices[0, 2, 15]) == sorted(want)
    table = frequencies.by_position[NAME]
    assert sorted(frequencies.positions(NAME, heads, 3)[1, 4, 15]) == sorted(table[4, :16].topk(3).indices)


def test_frequencies_errors(teacher, frequencies):
    with pytest.raises(ValueError, match="stream must have at least one batch"):
        Frequencies(teacher, [])
    with pytest.raises(ValueError, match="the batches of stream must have one length, got 8 and 24"):
        Frequencies(teacher, batches(1) + batches(1, 8))
    longer = observe(teacher, batches(1, LENGTH + 1)[0]).layers[NAME]
    with pytest.raises(ValueError, match="no longer than those counted \\(24\\), got 25"):
        frequencies.positions(NAME, longer, 3)
