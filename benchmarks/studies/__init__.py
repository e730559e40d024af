"""The quality studies: what the ideas are worth on real text. `sparse-attn study NAME` runs one."""
