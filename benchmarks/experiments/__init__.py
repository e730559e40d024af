"""Single questions, one file each: `python -m benchmarks.experiments.NAME --help`."""
