"""Modules over the ops."""

from sparse_attn.nn.head_approximator import HeadApproximator
from sparse_attn.nn.hybrid_attention import HybridAttention
from sparse_attn.nn.indexer import Indexer
from sparse_attn.nn.key_selector import KeySelector
from sparse_attn.nn.low_rank_scorer import LowRankScorer
from sparse_attn.nn.topk_attention import TopKAttention
from sparse_attn.nn.variable_width_embedding import VariableWidthEmbedding
from sparse_attn.nn.variable_width_head import VariableWidthHead

__all__ = [
    "HeadApproximator",
    "HybridAttention",
    "Indexer",
    "KeySelector",
    "LowRankScorer",
    "TopKAttention",
    "VariableWidthEmbedding",
    "VariableWidthHead",
]
