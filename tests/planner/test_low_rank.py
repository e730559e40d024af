"""factorize: the optimum per band, weighted by frequency, and its report."""

import json
import re

import numpy
import pytest
import torch

from sparse_attn.planner import WidthPlan, factorize, plan_widths, uniform_low_rank


def random_table(tokens: int, dim: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.5
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    return (torch.randn(tokens, dim, dtype=torch.float64, generator=generator) * scale @ rotation).to(dtype)


def zipf(tokens: int) -> torch.Tensor:
    return (1e6 / torch.arange(1, tokens + 1)).double()


def rebuilt(tables, projections, plan) -> torch.Tensor:
    out = torch.empty(plan.num_embeddings, plan.embedding_dim, dtype=torch.float64)
    for band, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        rows = table.double() if projection is None else table.double() @ projection.double().T
        out[plan.tokens_of(band)] = rows
    return out


def relative(got, want, weights) -> float:
    return float((weights @ (got - want).square().sum(1)) / (weights @ want.square().sum(1)))


PLAN = WidthPlan(24, [24, 9, 3], torch.arange(300) * 7 % 3)


def test_it_is_the_truncated_svd_of_the_weighted_rows():
    table, counts = random_table(300, 24), zipf(300)
    tables, projections, report = factorize(table, counts, PLAN)
    for band, width in enumerate(PLAN.widths):
        tokens = PLAN.tokens_of(band)
        weighted = counts[tokens].sqrt()[:, None] * table[tokens]
        singular = torch.linalg.svdvals(weighted)
        best = float(singular[width:].square().sum() / singular.square().sum())
        assert report.bands[band].weighted == pytest.approx(best, abs=1e-12)
        assert tables[band].shape == (len(tokens), width)
    assert projections[0] is None
    assert torch.equal(tables[0], table[PLAN.tokens_of(0)])
    for projection, width in zip(projections[1:], PLAN.widths[1:], strict=True):
        assert projection.shape == (24, width)
        torch.testing.assert_close(projection.T @ projection, torch.eye(width, dtype=torch.float64))


def test_the_report_is_what_is_lost():
    table, counts = random_table(300, 24), zipf(300)
    tables, projections, report = factorize(table, counts, PLAN)
    back = rebuilt(tables, projections, PLAN)
    assert report.weighted == pytest.approx(relative(back, table, counts))
    assert report.plain == pytest.approx(relative(back, table, torch.ones(300).double()))
    for band, entry in enumerate(report.bands):
        tokens = PLAN.tokens_of(band)
        assert entry.weighted == pytest.approx(
            relative(back[tokens], table[tokens], counts[tokens]), abs=1e-12
        )
        assert entry.share == pytest.approx(float(counts[tokens].sum() / counts.sum()))
        assert (entry.tokens, entry.width) == (len(tokens), PLAN.widths[band])
    assert report.parameters == sum(entry.parameters for entry in report.bands) == PLAN.num_parameters()
    assert json.loads(json.dumps(report.as_dict()))["bands"][1]["width"] == 9


def test_the_report_prints_a_table():
    text = str(factorize(random_table(300, 24), zipf(300), PLAN)[2])
    assert len(text.splitlines()) == 1 + 1 + 3 + 1
    assert re.search(r"all +300 +[\d,]+ +[\d.]+% +[\d.]+%", text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    table = random_table(300, 24)
    exact = factorize(table, zipf(300), PLAN)[2]
    tables, projections, report = factorize(table.to(dtype), zipf(300), PLAN)
    assert {t.dtype for t in (*tables, *projections[1:])} == {dtype}
    # A rounded row and a rounded projection each add about eps² of relative energy, on both sides of the product.
    assert report.weighted == pytest.approx(exact.weighted, rel=1e-3, abs=4 * torch.finfo(dtype).eps ** 2)


def test_a_table_of_low_rank_is_kept_exactly():
    left, right = random_table(200, 5), random_table(5, 32)
    _, _, report = factorize(left @ right, zipf(200), WidthPlan(32, [8], torch.zeros(200, dtype=torch.int32)))
    assert report.weighted < 1e-20


def test_frequent_tokens_are_kept_better():
    table = random_table(400, 24)
    counts = torch.ones(400)
    counts[:10] = 1e6
    plan = WidthPlan(24, [8], torch.zeros(400, dtype=torch.int32))
    tables, projections, report = factorize(table.float(), counts, plan)
    back = rebuilt(tables, projections, plan)
    kept = relative(back[:10], table[:10], torch.ones(10).double())
    assert kept < 0.2 * report.plain
    even = factorize(table, torch.ones(400), plan)[2]
    assert even.plain < report.plain
    assert even.weighted == pytest.approx(even.plain)


def test_tokens_that_never_occur():
    counts = zipf(300)
    counts[PLAN.tokens_of(2)] = 0
    _, projections, report = factorize(random_table(300, 24), counts, PLAN)
    assert report.bands[2].weighted is None
    assert 0 < report.bands[2].plain < 1
    assert report.bands[2].share == 0
    assert "–" in str(report)
    assert torch.isfinite(projections[2]).all()
    assert factorize(random_table(300, 24), torch.zeros(300), PLAN)[2].weighted is None


def test_counts_of_any_size():
    table = random_table(300, 24, torch.float32)
    want = factorize(table, zipf(300), PLAN)[0]
    for scale in (1e-12, 1e12):
        got = factorize(table, zipf(300) * scale, PLAN)[0]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_small_and_empty_bands():
    plan = WidthPlan(16, [16, 8, 4], torch.tensor([0, 0, 2, 2, 2]))  # fewer rows than the width
    tables, projections, report = factorize(random_table(5, 16), torch.ones(5), plan)
    assert [len(t) for t in tables] == [2, 0, 3]
    assert projections[1].shape == (16, 8)
    assert report.bands[2].plain < 1e-20  # three rows have rank three


def test_the_same_every_time_and_no_gradient():
    table = random_table(300, 24, torch.float32).requires_grad_()
    first, again = (factorize(table, zipf(300), PLAN) for _ in range(2))
    for a, b in zip((*first[0], *first[1][1:]), (*again[0], *again[1][1:]), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    with torch.no_grad():
        first[0][0].zero_()  # a copy, not a view of the table
    assert table.abs().min() > 0


def test_uniform_low_rank_is_one_band_of_that_many_parameters():
    table, counts = random_table(300, 24), zipf(300)
    tables, projections, report = uniform_low_rank(table, counts, 324 * 7 + 323)
    assert tables[0].shape == (300, 7)
    assert projections[0].shape == (24, 7)
    assert report.parameters == 324 * 7
    assert uniform_low_rank(table, counts, 300 * 24)[2].weighted == 0
    with pytest.raises(ValueError, match="at least V \\+ D = 324"):
        uniform_low_rank(table, counts, 323)


def test_bands_lose_less_than_a_uniform_table_of_as_many_parameters():
    table, counts = random_table(3000, 64), zipf(3000)
    plan = plan_widths(counts, 64, ratio=0.4)
    assert (
        factorize(table, counts, plan)[2].weighted
        < uniform_low_rank(table, counts, plan.num_parameters())[2].weighted
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": random_table(299, 24)}, ValueError, "one entry per row of the table, 299, got 300"),
        ({"table": random_table(300, 25)}, ValueError, "shape \\[300, 25\\], got one for \\[300, 24\\]"),
        ({"table": torch.ones(300, 24, dtype=torch.int64)}, TypeError, "floating-point tensor"),
        ({"table": torch.ones(300)}, ValueError, "shape \\[V, D\\]"),
        ({"table": numpy.ones((300, 24))}, TypeError, "floating-point tensor"),
        ({"table": torch.full((300, 24), float("nan"))}, ValueError, "table must be finite"),
        ({"counts": -zipf(300)}, ValueError, "not negative"),
        ({"plan": [24, 9, 3]}, TypeError, "plan must be a WidthPlan"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"table": random_table(300, 24), "counts": zipf(300), "plan": PLAN, **change}
    with pytest.raises(error, match=message):
        factorize(**arguments)
