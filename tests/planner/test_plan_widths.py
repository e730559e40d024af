"""plan_widths: the budget, monotone widths, multiples, unused tokens, the rules, and what it refuses."""

import itertools
import time

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparse_attn
from sparse_attn import plan_widths
from sparse_attn.planner.choose_widths import RULES
from sparse_attn.planner.lagrange import error_model

rules = pytest.mark.parametrize("rule", RULES)


def zipf(tokens: int, exponent: float = 1.0) -> torch.Tensor:
    return (1e7 / torch.arange(1, tokens + 1).double() ** exponent).floor()


def width_of(plan) -> torch.Tensor:
    """The width of each token, [V]."""
    return torch.tensor(plan.widths)[plan.token_band.long()]


def most_used(tokens: int, dim: int, budget: int, multiple_of: int) -> int:
    """The most parameters, not above budget, of any plan of one or two bands that are worth their projections.

    That is by trying all; where a band would be smaller with full rows, or both with the wide ones, that counts.
    """
    grid = [*range(multiple_of, dim, multiple_of), dim]
    best = 0
    for wide, narrow in itertools.combinations_with_replacement(grid[::-1], 2):
        first = numpy.arange(1, tokens + 1) if wide != narrow else numpy.array([tokens])
        rest = tokens - first
        full = (wide == dim) | ((first + dim) * wide >= first * dim)
        full_rest = full & ((rest + dim) * narrow >= rest * dim)
        sizes = numpy.where(full, first * dim, (first + dim) * wide)
        sizes += numpy.where(full_rest, rest * dim, (rest + dim * (rest > 0)) * narrow)
        sizes = numpy.minimum(sizes, min(tokens * dim, (tokens + dim) * wide))
        best = max(best, int(sizes[sizes <= budget].max(initial=0)))
    return best


def check(plan, counts, dim, budget, num_bands, multiple_of):
    counts = torch.as_tensor(counts).double()
    assert plan.num_embeddings == len(counts)
    assert plan.embedding_dim == dim
    assert plan.num_parameters() <= budget
    assert 1 <= plan.num_bands <= num_bands
    assert all(size > 0 for size in plan.band_sizes)
    assert all(width % multiple_of == 0 or width == dim for width in plan.widths)
    assert all(wide > narrow for wide, narrow in itertools.pairwise(plan.widths))
    widths = width_of(plan)[counts.sort(descending=True, stable=True).indices]
    assert (widths[:-1] >= widths[1:]).all(), "a more frequent token has a narrower row"


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    counts=COUNTS,
    dim=st.integers(1, 40),
    multiple_of=st.sampled_from([1, 3, 4, 8]),
    num_bands=st.integers(1, 5),
    share=st.floats(0, 1.1),
    rule=st.sampled_from(RULES),
)
@example(counts=[0], dim=1, multiple_of=1, num_bands=1, share=0.0, rule="power")
@example(counts=[0, 0, 0], dim=40, multiple_of=1, num_bands=5, share=0.9, rule="mass")
@example(counts=[1] * 60, dim=40, multiple_of=1, num_bands=3, share=0.9, rule="lagrange")
def test_budget_and_order_hold(counts, dim, multiple_of, num_bands, share, rule):
    full = len(counts) * dim
    least = min(full, (len(counts) + dim) * min(multiple_of, dim))
    budget = max(1, int(least + share * (full - least)))
    plan = plan_widths(counts, dim, budget=budget, num_bands=num_bands, rule=rule, multiple_of=multiple_of)
    check(plan, counts, dim, budget, num_bands, multiple_of)
    if budget >= full:
        assert plan.widths == (dim,)
    elif num_bands >= 2 and most_used(len(counts), dim, budget, multiple_of) >= 0.97 * budget:
        assert plan.num_parameters() >= 0.97 * budget


@rules
@pytest.mark.parametrize("ratio", [0.04, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_bands", [2, 3, 4, 8])
def test_uses_the_budget_on_a_real_sort_of_vocabulary(rule, ratio, num_bands):
    counts = zipf(20_000, 1.2)[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))]
    budget = int(ratio * 20_000 * 256)
    plan = plan_widths(counts, 256, ratio=ratio, num_bands=num_bands, rule=rule)
    check(plan, counts, 256, budget, num_bands, 8)
    assert plan.num_parameters() >= 0.97 * budget


@rules
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_equal_counts(rule, ratio):
    plan = plan_widths(torch.ones(5000), 64, ratio=ratio, rule=rule)
    assert 0.97 * ratio * 5000 * 64 <= plan.num_parameters() <= ratio * 5000 * 64


@rules
def test_counts_that_are_all_zero_are_equal_counts(rule):
    nothing = plan_widths(torch.zeros(500), 64, ratio=0.5, rule=rule)
    assert nothing == plan_widths(torch.ones(500), 64, ratio=0.5, rule=rule)


@rules
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_tokens_that_never_occur_are_in_the_narrowest_band(rule, ratio):
    counts = torch.cat([torch.zeros(2000), zipf(4000, 1.1)])
    plan = plan_widths(counts, 128, ratio=ratio, rule=rule)
    assert (plan.token_band[counts == 0] == plan.num_bands - 1).all()
    assert plan.num_parameters() >= 0.97 * int(ratio * 6000 * 128)


@pytest.mark.parametrize("budget", [100 * 32, 10**12])
def test_enough_for_the_full_table_is_the_full_table(budget):
    plan = plan_widths(zipf(100), 32, budget=budget)
    assert plan.widths == (32,)
    assert plan.num_parameters() == 100 * 32
    assert plan == plan_widths(zipf(100), 32, ratio=1.0)


@rules
def test_the_smallest_budget_works_and_one_less_says_what_is(rule):
    least = (5000 + 64) * 8
    assert plan_widths(zipf(5000), 64, budget=least, rule=rule).widths == (8,)
    with pytest.raises(ValueError, match=f"at least {least:,} parameters.* got {least - 1:,}"):
        plan_widths(zipf(5000), 64, budget=least - 1, rule=rule)


@rules
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_tiny_vocabularies(rule, tokens):
    for num_bands in (1, 4, 100):
        plan = plan_widths([5] * tokens, 16, budget=16 * tokens, num_bands=num_bands, rule=rule)
        assert plan.widths == (16,)
    with pytest.raises(ValueError, match=f"at least {16 * tokens} parameters"):
        plan_widths([5] * tokens, 16, budget=16 * tokens - 1, rule=rule)


def test_more_bands_than_distinct_counts():
    plan = plan_widths([9, 9, 9, 1, 1, 1] * 50, 8, ratio=0.6, num_bands=50, multiple_of=1)
    assert plan.num_parameters() >= 0.97 * 0.6 * 2400 - 1


@pytest.mark.parametrize("multiple_of", [1, 5, 16, 64])
def test_multiples(multiple_of):
    plan = plan_widths(zipf(5000), 192, ratio=0.4, multiple_of=multiple_of)
    check(plan, zipf(5000), 192, int(0.4 * 5000 * 192), 4, multiple_of)


def test_multiples_past_the_width_leave_the_full_table():
    assert plan_widths([1, 2], 4, budget=8).widths == (4,)
    with pytest.raises(ValueError, match="at least 8 parameters"):
        plan_widths([1, 2], 4, budget=7)


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([3, 1, 2], dtype=torch.int32),
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.float16),
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.bfloat16),
        numpy.array([3, 1, 2], dtype=numpy.uint64),
        [3, 1, 2],
        (3, 1, 2.0),
    ],
    ids=str,
)
def test_counts_may_come_as(counts):
    assert plan_widths(counts, 2, budget=6).num_embeddings == 3


def test_scaling_the_counts_changes_nothing():
    counts = zipf(3000) + 1
    assert plan_widths(counts, 64, ratio=0.3) == plan_widths(counts / counts.sum(), 64, ratio=0.3)


def test_the_same_counts_give_the_same_plan():
    assert plan_widths(zipf(9000), 64, ratio=0.3) == plan_widths(zipf(9000), 64, ratio=0.3)


def expected_error(plan, counts, beta) -> float:
    shares = counts.double() / counts.sum()
    return float(shares @ torch.from_numpy(error_model(plan.embedding_dim, beta))[width_of(plan)])


@pytest.mark.parametrize("beta", [0.3, 0.9, 1.5])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_lagrange_is_as_good_as_trying_everything(ratio, beta):
    """Against all plans of at most two bands."""
    tokens, dim, multiple_of = 120, 24, 4
    counts = zipf(tokens, 1.3)
    budget = int(ratio * tokens * dim)
    error = error_model(dim, beta)
    mass = torch.cat([torch.zeros(1), (counts / counts.sum()).cumsum(0)]).numpy()
    grid = list(range(multiple_of, dim + 1, multiple_of))
    best = numpy.inf
    for wide, narrow in itertools.combinations_with_replacement(grid[::-1], 2):
        for first in range(1, tokens):
            projections = sum(dim * w for w in {wide, narrow} if w < dim)
            if first * wide + (tokens - first) * narrow + projections <= budget:
                best = min(best, mass[first] * error[wide] + (1 - mass[first]) * error[narrow])
    plan = plan_widths(counts, dim, budget=budget, num_bands=2, multiple_of=multiple_of, beta=beta)
    assert expected_error(plan, counts, beta) <= best * (1 + 1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_lagrange_loses_least_of_the_rules_and_more_bands_do_not_hurt(ratio):
    counts = zipf(20_000, 1.1)
    errors = {
        rule: expected_error(plan_widths(counts, 256, ratio=ratio, rule=rule), counts, 0.9) for rule in RULES
    }
    assert min(errors, key=errors.get) == "lagrange"
    by_bands = [
        expected_error(plan_widths(counts, 256, ratio=ratio, num_bands=n), counts, 0.9)
        for n in (1, 2, 3, 4, 6)
    ]
    assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(by_bands))


def test_the_error_model():
    error = error_model(50, 0.9)
    assert error[0] == 1
    assert error[50] == 0
    steps = numpy.diff(error)
    assert (steps < 0).all()
    assert (numpy.diff(steps) >= 0).all(), "convex"


def test_a_flatter_spectrum_gives_the_rare_tokens_more():
    flat, steep = (plan_widths(zipf(5000), 128, ratio=0.3, beta=beta) for beta in (2.5, 0.3))
    assert flat.band_sizes[0] < steep.band_sizes[0]


def test_mass_bands_end_at_their_shares():
    counts = zipf(50_000)
    plan = plan_widths(counts, 256, ratio=0.1, rule="mass", num_bands=3)
    shares = torch.stack([counts[plan.token_band == band].sum() for band in range(3)]) / counts.sum()
    # What is left of the budget moves the boundaries outwards, never inwards.
    assert shares[0] >= 0.8
    assert shares[:2].sum() >= 0.95
    assert 2 <= plan.widths[0] / plan.widths[1] <= 8


def test_power_widths_follow_the_frequency():
    plan = plan_widths(zipf(50_000), 512, ratio=0.05, rule="power", alpha=0.4)
    steeper = plan_widths(zipf(50_000), 512, ratio=0.05, rule="power", alpha=0.9)
    assert plan.widths[0] / plan.widths[-1] < steeper.widths[0] / steeper.widths[-1]


def test_quick_for_a_large_vocabulary():
    start = time.process_time()  # not of the clock: other processes do not count
    plan_widths(zipf(250_000), 1024, ratio=0.2)
    assert time.process_time() - start < 10  # 0.2 s where this was written


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, -2.0], 8), {"budget": 16}, ValueError, "not negative, got -2 for token 1"),
        (([1.0, float("nan"), float("nan")], 8), {"budget": 16}, ValueError, "got nan for token 1 \\(2 such"),
        (([1.0, float("inf")], 8), {"budget": 16}, ValueError, "finite.*got inf for token 1"),
        ((torch.ones(2, 2), 8), {"budget": 16}, ValueError, "shape \\[V\\].*got shape \\[2, 2\\]"),
        ((torch.tensor(3), 8), {"budget": 16}, ValueError, "shape \\[V\\]"),
        (([], 8), {"budget": 16}, ValueError, "at least one, got none"),
        ((torch.zeros(0), 8), {"budget": 16}, ValueError, "at least one, got none"),
        ((["a"], 8), {"budget": 16}, TypeError, "counts must be numbers"),
        ((None, 8), {"budget": 16}, TypeError, "counts must be numbers"),
        ((torch.tensor([True]), 8), {"budget": 16}, TypeError, "counts must be numbers"),
        (([1], 0), {"budget": 16}, ValueError, "embedding_dim must be at least 1"),
        (([1], 8), {}, ValueError, "exactly one of budget .* and ratio .* got neither"),
        (([1], 8), {"budget": 1, "ratio": 0.5}, ValueError, "exactly one .*budget=1 and ratio=0.5"),
        (([1], 8), {"budget": 0}, ValueError, "budget must be at least 1"),
        (([1], 8), {"budget": 1.5}, TypeError, "budget must be an int"),
        (([1], 8), {"ratio": 0.0}, ValueError, "ratio must be a number in \\(0, 1\\]"),
        (([1], 8), {"ratio": float("nan")}, ValueError, "ratio must be a number in \\(0, 1\\]"),
        (([1], 8), {"ratio": 4}, ValueError, "4 times smaller give ratio=1/4"),
        (([1], 8), {"ratio": "half"}, TypeError, "ratio must be a number"),
        (([1], 8), {"budget": 8, "num_bands": 0}, ValueError, "num_bands must be at least 1"),
        (([1], 8), {"budget": 8, "multiple_of": 0}, ValueError, "multiple_of must be at least 1"),
        (([1], 8), {"budget": 8, "rule": "best"}, ValueError, "'lagrange', 'power', 'mass', got 'best'"),
        (([1], 8), {"budget": 8, "beta": 0}, ValueError, "beta must be a number in \\(0, 4\\]"),
        (([1], 8), {"budget": 8, "beta": 10**400}, ValueError, "beta must be a number in \\(0, 4\\]"),
        (([1], 8), {"budget": 8, "alpha": 2}, ValueError, "alpha must be a number in \\[0, 1\\]"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        plan_widths(*arguments, **options)


def test_public_names():
    assert sparse_attn.plan_widths is plan_widths
    assert sparse_attn.WidthPlan is type(plan_widths([1], 1, budget=1e0))
