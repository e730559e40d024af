"""A cache in pages against the same keys end to end: `pytest benchmarks/bench_paged_attention.py`."""

from benchmarks.suite import suite_of

test_paged_attention = suite_of("paged_attention")
