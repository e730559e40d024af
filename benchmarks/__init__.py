"""Benchmarks of a checkout: `pytest benchmarks`, experiments, studies and GPU runs over `sparse_attn.bench`."""
