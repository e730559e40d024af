"""Intervals against scipy's."""

import pytest

from sparse_attn.evaluation import interval
from sparse_attn.evaluation.intervals import t_quantile

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 30, 200])
def test_quantiles(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


def test_an_interval():
    values = [0.3, -0.1, 0.7, 0.2]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert interval([2.0]).half is None
    assert str(interval([2.0])) == "+2.0000"
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
