"""Modules over the ops."""

from sparse_attn.nn.head_approximator import HeadApproximator
from sparse_attn.nn.hybrid_attention import HybridAttention
from sparse_attn.nn.key_selector import KeySelector
from sparse_attn.nn.topk_attention import TopKAttention
from sparse_attn.nn.variable_width_embedding import VariableWidthEmbedding
from sparse_attn.nn.variable_width_head import VariableWidthHead

__all__ = [
    "HeadApproximator",
    "HybridAttention",
    "KeySelector",
    "TopKAttention",
    "VariableWidthEmbedding",
    "VariableWidthHead",
]
