"""`variable_width_cross_entropy` timed: `pytest benchmarks/bench_variable_width_cross_entropy.py`."""

from benchmarks.suite import suite_of

test_variable_width_cross_entropy = suite_of("variable_width_cross_entropy")
