"""One file per op, named as the op and ending in `OP = …` (see `sparse_attn.bench.registry`)."""
