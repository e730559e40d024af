"""Top-k gathered sparse attention for PyTorch: `sparse_attn.topk_attention(q, k, v, top_k=…)`."""

from sparse_attn import nn
from sparse_attn.ops import (
    block_attention,
    block_select,
    gathered_attention,
    indexer_loss,
    indexer_select,
    quantized_select,
    refine_blocks,
    topk_attention,
    topk_attention_with_residual,
    topk_select,
    variable_width_cross_entropy,
    variable_width_embedding,
)
from sparse_attn.ops.topk_attention import explain
from sparse_attn.planner import WidthPlan, plan_widths
from sparse_attn.wings.base import use_backend

__version__ = "0.1.0"
__all__ = [
    "WidthPlan",
    "block_attention",
    "block_select",
    "explain",
    "gathered_attention",
    "indexer_loss",
    "indexer_select",
    "nn",
    "plan_widths",
    "quantized_select",
    "refine_blocks",
    "topk_attention",
    "topk_attention_with_residual",
    "topk_select",
    "use_backend",
    "variable_width_cross_entropy",
    "variable_width_embedding",
]
