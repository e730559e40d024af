"""Hierarchical selection: exact where nothing is left out, the choice that its definition says where something is."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn.selection import Exact, Hierarchical, Refined, Rule, Selector, attend, select_and_attend


def inputs(length: int, queries: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, queries or length, 16, generator=generator),
        torch.randn(2, 2, length, 16, generator=generator),
        torch.randn(2, 2, length, 16, generator=generator),
    )


@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize(
    ("length", "queries"), [(1000, 1000), (1000, 1), (1000, 130), (257, 257), (64, 64), (10, 10), (1, 1)]
)
def test_with_room_for_all_it_is_exact(length, queries, share):
    q, k, _ = inputs(length, queries)
    rule = Rule(is_causal=True, causal_offset=length - queries, share=share)
    ours = Hierarchical(16, 4, 1000).select(q, k, 8, rule).indices
    assert torch.equal(ours, Exact().select(q, k, 8, rule).indices)
    if queries == length:
        rule = Rule(share=share)
        ours = Hierarchical(16, 4, 1000).select(q, k, 8, rule).indices
        assert torch.equal(ours, Exact().select(q, k, 8, rule).indices)


def by_definition(q, k, top_k, size, group, factor):
    """One head, causal, in float64 and loops: the set of keys of each query."""
    length = len(k)
    q, k = q.double(), k.double()
    count = -(-length // size)
    tiles = [q[n * size : (n + 1) * size].mean(0) for n in range(count)]
    blocks = [k[m * size : (m + 1) * size].mean(0) for m in range(count)]
    wanted = min(factor * -(-top_k // size) + 2, count)
    groups = max(factor * -(-wanted // group) + 2, 3)
    chosen = []
    for n in range(count):
        # Groups of blocks: the first, the own, the best others.
        means = [torch.stack(blocks[g : g + group]).mean(0) for g in range(0, count, group)]
        seen = [g for g in range(len(means)) if g * group <= n]
        must = {0, n // group}
        others = sorted((g for g in seen if g not in must), key=lambda g: -float(tiles[n] @ means[g]))
        kept = must | set(others[: groups - len(must)])
        # Blocks: the first, the own, the best others within those groups.
        must = {0, n}
        others = [m for m in range(n + 1) if m // group in kept and m not in must]
        others.sort(key=lambda m: -float(tiles[n] @ blocks[m]))
        among = must | set(others[: wanted - len(must)])
        for i in range(n * size, min(length, (n + 1) * size)):
            keys = [j for j in range(i + 1) if j // size in among]
            keys.sort(key=lambda j: -float(q[i] @ k[j]))
            chosen.append(set(keys[:top_k]))
    return chosen


def test_it_is_the_three_choices_of_its_definition():
    size, group, factor, top_k, length = 4, 2, 1, 6, 150
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, length, 8, generator=generator) for _ in range(2))
    ours = Hierarchical(size, group, factor).select(q, k, top_k, Rule(is_causal=True)).indices[0, 0]
    expected = by_definition(q[0, 0], k[0, 0], top_k, size, group, factor)
    exact = Exact().select(q, k, top_k, Rule(is_causal=True)).indices[0, 0]
    assert [set(row.tolist()) - {-1} for row in ours] == expected
    assert not torch.equal(ours, exact)  # something was left out


def test_what_it_returns_is_a_selection():
    q, k, v = inputs(700)
    rule = Rule(is_causal=True)
    chosen = Hierarchical(16, 4, 2).select(q, k, 32, rule).indices
    assert chosen.dtype == torch.int32
    assert chosen.shape == (2, 4, 700, 32)
    filled = chosen >= 0
    assert (chosen <= torch.arange(700)[:, None]).all()
    assert ((chosen[..., 1:] > chosen[..., :-1]) | ~filled[..., 1:]).all()
    assert isinstance(Hierarchical(), Selector)
    out = select_and_attend(q, k, v, 32, Hierarchical(16, 4, 2), rule)
    assert torch.equal(out, attend(q, k, v, Hierarchical(16, 4, 2).select(q, k, 32, rule), rule=rule))


def test_keys_that_are_like_their_neighbours_are_found():
    """A group of keys that the queries look for stands far away: blocks lead to it, and to its best tokens."""
    length, place = 8192, 3000
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    q = q + 12 * direction
    k[:, :, place : place + 64] += 8 * direction
    rule = Rule(is_causal=True)
    found = Hierarchical().select(q, k, 64, rule).indices[0, 0, place + 128 :]
    inside = (found >= place) & (found < place + 64)
    assert inside.float().mean() > 0.95
    exact = Exact().select(q, k, 64, rule).indices[0, 0, place + 128 :]
    refined = Refined().select(q, k, 64, rule).indices[0, 0, place + 128 :]
    recall, of_refined = (
        float((f[:, :, None] == exact[:, None, :]).any(1).float().mean()) for f in (found, refined)
    )
    assert recall > 0.95
    assert math.isclose(recall, of_refined, abs_tol=0.02)


def test_what_it_cannot_keep_it_refuses():
    q, k, _ = inputs(64)
    for rule in (
        Rule(attn_mask=torch.ones(64, 64, dtype=torch.bool)),
        Rule(is_causal=True, window=3),
        Rule(sinks=1),
        Rule(key_lengths=torch.tensor([64, 3])),
        Rule(is_causal=True, causal_offset=torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="blocks of blocks"):
            Hierarchical().select(q, k, 8, rule)
    for wrong, name in (
        ({"block_size": 0}, "block_size"),
        ({"group": 1}, "group"),
        ({"factor": 0}, "factor"),
    ):
        with pytest.raises(ValueError, match=name):
            Hierarchical(**wrong)
    with pytest.raises(TypeError, match="Rule"):
        Hierarchical().select(q, k, 8, None)


def holds_the_contract(indices, length: int) -> None:
    """Unique, ascending, in range, causal, the empty slots last."""
    last = torch.arange(length)[:, None]
    assert bool((indices <= last).all())
    assert bool((indices >= -1).all())
    filled = torch.where(indices < 0, length, indices)
    steps = filled.diff(dim=-1)
    assert bool((steps.gt(0) | (filled[..., 1:] == length)).all())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("share", ["none", "kv", "all"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_key_reaches_the_queries_that_see_it_alone(backend, share, bad):
    length, where = 500, 173
    q, k, v = inputs(length)
    selector, rule = Hierarchical(16, 4, 2, backend=backend), Rule(is_causal=True, share=share)
    clean = selector.select(q, k, 24, rule).indices
    k[0, 1, where, 3] = bad
    indices = selector.select(q, k, 24, rule).indices
    holds_the_contract(indices, length)
    assert torch.equal(indices[1], clean[1])  # of another sequence
    # Of queries before its group of blocks, whose mean all tiles in it meet; NaN, which such a choice keeps
    # whatever it is, changes nothing up to the key itself.
    before = where if math.isnan(bad) else where // 64 * 64
    assert torch.equal(indices[0, :, :before], clean[0, :, :before])
    out = attend(q, k, v, selector.select(q, k, 24, rule), rule=rule)
    if math.isnan(bad):
        # The heads of the other key head have it only where they share a selection, and not its score.
        assert torch.isfinite(out[0, :2]).all()
        assert torch.isnan(out[0, 2:, where:]).all()
        assert torch.isfinite(out[0, 2:, :where]).all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_a_query_of_nan_reaches_its_own_tile_alone(backend, share):
    length, where, tile = 500, 173, 16
    q, k, v = inputs(length)
    selector, rule = Hierarchical(tile, 4, 2, backend=backend), Rule(is_causal=True, share=share)
    clean = selector.select(q, k, 24, rule).indices
    q[0, 3, where] = math.nan
    indices = selector.select(q, k, 24, rule).indices
    holds_the_contract(indices, length)
    first = where // tile * tile
    assert torch.equal(indices[1], clean[1])
    for rows in (slice(0, first), slice(first + tile, length)):
        assert torch.equal(indices[0, :, rows], clean[0, :, rows])
    out = attend(q, k, v, selector.select(q, k, 24, rule), rule=rule)
    expected = torch.zeros(out.shape[:3], dtype=torch.bool)
    expected[0, 3, where] = True  # attention of its neighbours is that of other keys, and finite
    assert torch.equal(torch.isnan(out).all(-1), expected)
    assert torch.equal(torch.isnan(out).any(-1), expected)


def test_nothing_but_nan():
    q, k, v = (torch.full_like(t, math.nan) for t in inputs(300))
    rule = Rule(is_causal=True)
    selection = Hierarchical(16, 4, 2).select(q, k, 24, rule)
    holds_the_contract(selection.indices, 300)
    assert torch.isnan(attend(q, k, v, selection, rule=rule)).all()
