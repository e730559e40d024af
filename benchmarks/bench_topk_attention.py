"""`topk_attention` against what one would use instead: `pytest benchmarks/bench_topk_attention.py`."""

from benchmarks.suite import suite_of

test_topk_attention = suite_of("topk_attention")
