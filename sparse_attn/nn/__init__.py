"""Modules over the ops."""

from sparse_attn.nn.topk_attention import TopKAttention

__all__ = ["TopKAttention"]
