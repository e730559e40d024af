"""`topk_select` against what one would use instead: `pytest benchmarks/bench_topk_select.py`."""

from benchmarks.suite import suite_of

test_topk_select = suite_of("topk_select")
