"""What the benchmarks are made of; it ships with the package, so that `sparse-attn bench` works wherever it is.

registry   the cases: one file per op in `cases/`, found by its name
runner     checks, then times contenders in turn; peak memory, scaling, the overhead of a call
suites     the standard tables          own_shape   the same for a shape of one's own
report     tables for the terminal      plots       one picture
"""
