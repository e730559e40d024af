"""topk_select of csrc/cuda on the simulated GPU: the tests of the op, and each way through its kernel.

The simulation is slow: of options, sharing and dtype every pair is taken, not every combination.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compare import assert_best, assert_identical
from helpers.inputs import OPTIONS, integers, mask, normal, with_scores
from helpers.pairwise import pairwise
from ops import test_topk_select as of_the_op
from ops.test_topk_select import (  # noqa: F401
    test_budgets,
    test_budgets_larger_than_any_key_count,
    test_causal_offsets,
    test_head_dimensions,
    test_mask_broadcasts,
    test_mask_per_head,
    test_mask_strides,
    test_scales,
    test_shared_mass_is_summed_over_heads,
    test_shared_ties_go_to_the_smaller_index,
)

from simt.device import SCHEDULES, Device
from simt.params import SelectPlan, select_call
from simt.wing import SimulatedWing
from sparse_attn.rule import Rule

pytestmark = pytest.mark.slow
WINGS = [
    SimulatedWing(dtypes=(torch.float32, torch.bfloat16))
]  # the half types differ in their conversions alone


DTYPES, SHARES = WINGS[0].dtypes, ("none", "kv", "all")


@pairwise(name=OPTIONS, share=SHARES, dtype=DTYPES, numbers=[(0, 1), (2, 3)])
def test_options_on_exact_scores(wing, dtype, name, share, numbers):
    of_the_op.options_on_exact_scores(wing, dtype, name, share, numbers)


@pairwise(name=OPTIONS, dtype=DTYPES, share=SHARES, numbers=[(0,), (1,)])
def test_options_on_normal_scores(wing, dtype, name, share, numbers):
    of_the_op.options_on_normal_scores(wing, dtype, name, share, numbers)


# How many of the 700 keys agree in the digits of their rank that are looked at first decides how many rounds there are.
SCORES = {
    "plateau": torch.full((700,), 7),  # to the last bit, and then they are ties
    "few values": torch.arange(700) * 7919 % 5,
    "zigzag": torch.arange(700) * 2617 % 700,  # three rounds
    "late winners": (torch.arange(700) > 660) * 9,
}


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("top_k", [1, 64, 300])
@pytest.mark.parametrize("order", SCORES)
def test_orders(wing, dtype, order, top_k):
    query, key = with_scores(SCORES[order], 8, dtype)
    for scale in (1.0, -1.0):
        assert_identical(wing.topk_select(query, key, top_k, scale=scale), query, key, top_k, scale=scale)


@pairwise(share=SHARES, dtype=DTYPES, top_k=[5, 200])
def test_candidates_are_merged(wing, dtype, share, top_k):
    """Close races, among them some that the first two digits leave open."""
    query, key = normal(1, 4, 70, 48, dtype=dtype), normal(1, 2, 700, 48, dtype=dtype, seed=1)
    options = {"share": share, "is_causal": True, "causal_offset": 630}
    assert_best(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


def test_scores_in_one_narrow_band(wing):
    """All scores within a few units in the last place of each other."""
    key = 1 + torch.randint(0, 9, (1, 1, 900, 1), generator=torch.Generator().manual_seed(0)) * 2.0**-23
    query = torch.ones(1, 1, 1, 1)
    for top_k in (10, 500):
        assert_identical(wing.topk_select(query, key, top_k), query, key, top_k)


def test_scores_over_the_whole_exponent_range(wing):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 101, (1, 1, 900, 1), generator=generator)
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    key, query = signs * torch.exp2(exponents.float()), torch.ones(1, 1, 1, 1)
    for top_k in (10, 700):
        assert_identical(wing.topk_select(query, key, top_k, scale=1.0), query, key, top_k, scale=1.0)


# Against a first threshold from every 63rd key (budgets below 192) or every 21st, from the middle of each on.
SAMPLED = torch.arange(2600) % 63 == 31, torch.arange(2600) % 21 == 10
HOSTILE = {
    "the sample has the best": lambda sampled: (
        sampled * 9 + torch.arange(2600) % 3
    ),  # too few beat its threshold
    "the sample has the worst": lambda sampled: ~sampled * 9 + torch.arange(2600) % 3,  # nearly all beat it
    "a plateau": lambda sampled: torch.full((2600,), 3),
    "zeros of both signs": lambda sampled: (torch.arange(2600) > 2590) * 2,
    "few above zeros": lambda sampled: (
        (torch.arange(2600) % 100 == 0) * 1 - (torch.arange(2600) % 7 == 0) * 1
    ),
    "shuffled": lambda sampled: torch.arange(2600) * 2617 % 251,
    "ascending": lambda sampled: torch.arange(2600) // 11,
    "descending": lambda sampled: -torch.arange(2600) // 11,
}
SAMPLE_RULES = {
    "plain": {},
    "causal, window and sinks": {"is_causal": True, "causal_offset": 2599, "window": 20, "sinks": 5},
    "lengths": {"key_lengths": torch.tensor([2001])},
    "starts": {"key_starts": torch.tensor([[700]])},
    "mask": {"attn_mask": mask(1, 1, 1, 2600)},
    "a mask of the sample": {"attn_mask": SAMPLED[0].view(1, 1, 1, 2600)},
    "a mask of the rest": {"attn_mask": ~SAMPLED[0].view(1, 1, 1, 2600)},
}


def sampled_call(query, key, top_k, **options) -> SelectPlan:
    packed = Rule(**options).packed(query, key, top_k)
    return select_call(Device(), query, key, top_k, *packed.parts()).plan


def in_one_piece(query, key):
    """Repeated for so many heads that the keys are in one piece, as when training."""
    return query.repeat(1, 8, 1, 1), key.repeat(1, 8, 1, 1)


@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("top_k", [40, 200])
@pytest.mark.parametrize("name", HOSTILE)
def test_scores_against_the_sample(wing, dtype, name, top_k):
    query, key = in_one_piece(*with_scores(HOSTILE[name](SAMPLED[top_k >= 192]), 8, dtype))
    assert sampled_call(query, key, top_k).stride > 1
    for scale in (1.0, -1.0):
        assert_identical(wing.topk_select(query, key, top_k, scale=scale), query, key, top_k, scale=scale)


@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("rule", SAMPLE_RULES)
@pytest.mark.parametrize("name", ["the sample has the best", "shuffled"])
def test_rules_with_a_sample(wing, dtype, name, rule):
    query, key = in_one_piece(*with_scores(HOSTILE[name](SAMPLED[0]), 8, dtype))
    options = SAMPLE_RULES[rule]
    assert sampled_call(query, key, 50, **options).stride == 63
    assert_identical(wing.topk_select(query, key, 50, **options), query, key, 50, **options)


@pytest.mark.dtypes(torch.bfloat16)
def test_some_rows_of_a_block_are_done_again(wing, dtype):
    """Two queries: the sample has the best keys of one, and for the other it is like any keys."""
    scores = [HOSTILE[name](SAMPLED[0]) for name in ("shuffled", "the sample has the best")]
    rows = [with_scores(each, 8, dtype) for each in scores]
    query = torch.cat(
        [torch.cat([q, torch.zeros_like(q)], -1).roll(8 * i, -1) for i, (q, _) in enumerate(rows)], 2
    )
    key = torch.cat([k for _, k in rows], -1)
    query, key = in_one_piece(query, key)
    results = [SimulatedWing(s).topk_select(query, key, 50) for s in SCHEDULES]
    assert_identical(results[0], query, key, 50)
    assert all(torch.equal(indices, results[0]) for indices in results[1:])


@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["sampled", "others", "many"])
def test_special_values_in_a_sample(wing, dtype, bad, where):
    query, key = torch.ones(1, 1, 1, 1), (torch.arange(2600) * 2617 % 251 + 1.0).view(1, 1, 2600, 1)
    bad_keys = {"sampled": SAMPLED[0], "others": ~SAMPLED[0] & (torch.arange(2600) % 5 == 0)}.get(where)
    bad_keys = torch.arange(2600) % 7 > 0 if bad_keys is None else bad_keys
    key[0, 0, bad_keys] = bad
    query, key = in_one_piece(query.to(dtype), key.to(dtype))
    found = wing.topk_select(query, key, 40)
    if bad < 0:
        assert_identical(found, query, key, 40)
        return
    first = bad_keys.nonzero().flatten()[:40]
    others = key[0, 0, :, 0].float().masked_fill(bad_keys, -1).sort(descending=True, stable=True).indices
    expected = torch.cat([first, others[: 40 - len(first)]]).sort().values
    assert all(row.tolist() == expected.tolist() for row in found[0, :, 0])


def test_lengths_of_either_width(wing):
    query, key = integers(3, 2, 9, 7), integers(3, 2, 90, 7, seed=1)
    for dtype in (torch.int32, torch.int64):
        options = {"key_lengths": torch.tensor([0, 70, 90], dtype=dtype)}
        assert_identical(wing.topk_select(query, key, 20, **options), query, key, 20, **options)


@pytest.mark.parametrize("share", SHARES)
def test_packed_sequences(wing, share):
    """Tiles of queries that begin behind a tile of keys or more, and one that holds the ends of two sequences."""
    query, key = integers(1, 4, 200, 7), integers(1, 2, 200, 7, seed=1)
    starts = torch.tensor([0] * 90 + [90] * 70 + [160] * 40)
    for given in (starts.expand(1, 200), starts.int().unsqueeze(0), starts[150:151]):
        options = {"key_starts": given, "is_causal": True, "window": 3, "sinks": 2, "share": share}
        compare = assert_identical if share == "none" else assert_best
        compare(wing.topk_select(query, key, 20, **options), query, key, 20, **options)


def pieces(query, key, top_k, share="none", **options) -> int:
    """How many pieces the keys of a call are in."""
    packed = Rule(share=share, **options).packed(query, key, top_k)
    return select_call(Device(), query, key, top_k, *packed.parts()).plan.splits


FEW = {
    "plain": {},
    "causal, window and sinks": {"is_causal": True, "causal_offset": 1998, "window": 5, "sinks": 3},
    "lengths": {"key_lengths": torch.tensor([1700])},
    "a length within the first piece": {"key_lengths": torch.tensor([9])},
    "starts": {"key_starts": torch.tensor([[600, 1990, 0]])},
    "mask": {"attn_mask": mask(1, 1, 3, 2000)},
}


@pairwise(name=FEW, share=["none", "all"], dtype=DTYPES, top_k=[9, 120])
def test_few_queries_have_their_keys_in_pieces(wing, dtype, name, share, top_k):
    """As when decoding. Integers: ties lie in several pieces."""
    query, key = integers(1, 2, 3, 7, dtype=dtype), integers(1, 1, 2000, 7, dtype=dtype, seed=1)
    options = FEW[name] | {"share": share}
    assert pieces(query, key, top_k, **options) > 1
    compare = assert_identical if share == "none" else assert_best
    compare(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


# (batch, query heads, key heads, queries): rows of a tile, of several tiles, and of one that ends within a head.
PACKS = [(2, 8, 2, 1), (1, 4, 1, 3), (1, 6, 1, 30), (2, 9, 3, 40)]


@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize(
    "name", ["plain", "causal, window and sinks", "lengths", "starts", "mask", "a mask per head"]
)
@pytest.mark.parametrize("sizes", PACKS)
def test_heads_with_the_same_keys_are_rows_of_one_tile(wing, dtype, name, sizes):
    batch, heads, kv_heads, queries = sizes
    query, key = (
        integers(batch, heads, queries, 7, dtype=dtype),
        integers(batch, kv_heads, 900, 7, dtype=dtype, seed=1),
    )
    options = {
        "plain": {},
        "causal, window and sinks": {
            "is_causal": True,
            "causal_offset": 890 - queries,
            "window": 5,
            "sinks": 3,
        },
        "lengths": {"key_lengths": torch.tensor([700, 13][:batch])},
        "starts": {"key_starts": (torch.arange(batch * queries) * 97 % 880).view(batch, queries)},
        "mask": {"attn_mask": mask(1, 1, queries, 900)},
        "a mask per head": {"attn_mask": mask(batch, heads, queries, 900)},
    }[name]
    packed = Rule(**options).packed(query, key, 20)
    assert select_call(Device(), query, key, 20, *packed.parts()).plan.packed == heads // kv_heads
    assert_identical(wing.topk_select(query, key, 20, **options), query, key, 20, **options)


@pytest.mark.dtypes(torch.bfloat16)
def test_packed_heads_in_pieces_and_in_every_schedule(wing, dtype):
    query, key = integers(1, 4, 1, 7, dtype=dtype), integers(1, 1, 3000, 7, dtype=dtype, seed=1)
    assert pieces(query, key, 50) > 1
    results = [SimulatedWing(s).topk_select(query, key, 50) for s in SCHEDULES]
    assert_identical(results[0], query, key, 50)
    assert all(torch.equal(indices, results[0]) for indices in results[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_special_values_in_pieces(wing, bad):
    """Of NaN and infinity more than there are slots, in the last pieces: they come first, the smaller index before."""
    query, key = (
        torch.ones(1, 1, 1, 1),
        torch.rand(1, 1, 2000, 1, generator=torch.Generator().manual_seed(0)) + 1,
    )
    key[0, 0, 1500::7] = bad
    assert pieces(query, key, 20) > 1
    if bad < 0:
        assert_identical(wing.topk_select(query, key, 20), query, key, 20)
    else:
        assert wing.topk_select(query, key, 20).flatten().tolist() == list(range(1500, 2000, 7))[:20]


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("share", ["none", "all"])
def test_every_schedule_gives_the_same_bits(wing, dtype, share):
    query, key = normal(1, 2, 40, 24, dtype=dtype), normal(1, 1, 150, 24, dtype=dtype, seed=1)
    results = [SimulatedWing(s).topk_select(query, key, 20, share=share) for s in SCHEDULES]
    assert all(torch.equal(indices, results[0]) for indices in results[1:])
    query, key = normal(1, 2, 2, 24, dtype=dtype), normal(1, 1, 1500, 24, dtype=dtype, seed=1)
    results = [SimulatedWing(s).topk_select(query, key, 20, share=share) for s in SCHEDULES]
    assert all(torch.equal(indices, results[0]) for indices in results[1:])
