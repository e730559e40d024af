"""Run by test_interpreted.py in a process with TRITON_INTERPRET=1, where `wing` is the Triton wing alone."""
