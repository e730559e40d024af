"""Modules over the ops."""

from sparse_attn.nn.indexer import Indexer
from sparse_attn.nn.low_rank_scorer import LowRankScorer
from sparse_attn.nn.topk_attention import TopKAttention
from sparse_attn.nn.variable_width_embedding import VariableWidthEmbedding
from sparse_attn.nn.variable_width_head import VariableWidthHead

__all__ = ["Indexer", "LowRankScorer", "TopKAttention", "VariableWidthEmbedding", "VariableWidthHead"]
