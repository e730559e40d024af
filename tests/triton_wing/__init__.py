"""The Triton wing without a GPU: interpreted against the reference, and compiled ahead of time for GPUs."""
