"""Packed documents against a padded batch and dense attention: `pytest benchmarks/bench_varlen_topk_attention.py`."""

from benchmarks.suite import suite_of

test_varlen_topk_attention = suite_of("varlen_topk_attention")
