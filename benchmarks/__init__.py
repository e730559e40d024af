"""Benchmarks: `python -m benchmarks.run` measures everything; `pytest benchmarks` runs the suites alone."""
