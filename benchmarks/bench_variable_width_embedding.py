"""`variable_width_embedding` against the alternatives: `pytest benchmarks/bench_variable_width_embedding.py`."""

from benchmarks.suite import suite_of

test_variable_width_embedding = suite_of("variable_width_embedding")
