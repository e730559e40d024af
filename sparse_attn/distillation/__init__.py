"""Cheap selections learn from a trained model's attention."""

from sparse_attn.distillation.indexers import distill_indexers

__all__ = ["distill_indexers"]
