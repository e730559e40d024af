"""Triton kernels: one file per op, with its host function, named as in the reference.

Installed as `sparse_attn.triton_kernels`. This file imports nothing, so that importing sparse_attn does not load
Triton; `sparse_attn/wings/triton.py` imports the file of an op on its first call.
"""
