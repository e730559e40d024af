"""`indexer_select` against what one would use instead: `pytest benchmarks/bench_indexer_select.py`."""

from benchmarks.suite import suite_of

test_indexer_select = suite_of("indexer_select")
