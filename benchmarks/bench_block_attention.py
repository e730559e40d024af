"""`block_attention` against what one would use instead: `pytest benchmarks/bench_block_attention.py`."""

from benchmarks.suite import suite_of

test_block_attention = suite_of("block_attention")
