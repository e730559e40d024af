"""How many steps a time allows."""

import pytest

from sparse_attn.demo.pace import Pace, fitted_steps
from sparse_attn.demo.train import EVALUATIONS


@pytest.mark.parametrize("seconds", [10, 100, 1000])
def test_the_fitted_steps_take_the_time(seconds):
    paces = [Pace(0.07, 0.2), Pace(0.05, 0.15)]
    steps = fitted_steps(paces, seconds)
    assert sum(pace.training(steps) for pace in paces) <= seconds
    assert sum(pace.training(steps + EVALUATIONS) for pace in paces) > seconds


def test_there_is_always_something_to_show_and_never_more_than_asked_for():
    assert fitted_steps([Pace(60.0, 1.0)], 10) == EVALUATIONS
    assert fitted_steps([Pace(1e-4, 1e-3)], 100, most=2000) == 2000
