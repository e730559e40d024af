"""Measures on a machine with a GPU: `python -m benchmarks.gpu` (`benchmarks/gpu_check.sh` has the commands)."""
