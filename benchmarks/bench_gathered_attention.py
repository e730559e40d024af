"""`gathered_attention` against what one would use instead: `pytest benchmarks/bench_gathered_attention.py`."""

from benchmarks.suite import suite_of

test_gathered_attention = suite_of("gathered_attention")
