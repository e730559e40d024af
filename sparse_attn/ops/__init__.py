"""The ops: public function, schema, fake and gradient, one file each."""

# The wings must stand before the ops, which define one overload per wing.
from sparse_attn import wings  # noqa: F401  isort: skip

from sparse_attn.ops.block_attention import block_attention
from sparse_attn.ops.block_select import block_select
from sparse_attn.ops.gathered_attention import gathered_attention
from sparse_attn.ops.indexer_loss import indexer_loss
from sparse_attn.ops.indexer_select import indexer_select
from sparse_attn.ops.quantized_select import quantized_select
from sparse_attn.ops.refine_blocks import refine_blocks
from sparse_attn.ops.residual_attention import topk_attention_with_residual
from sparse_attn.ops.topk_attention import topk_attention
from sparse_attn.ops.topk_select import topk_select
from sparse_attn.ops.variable_width_cross_entropy import variable_width_cross_entropy
from sparse_attn.ops.variable_width_embedding import variable_width_embedding

__all__ = [
    "block_attention",
    "block_select",
    "gathered_attention",
    "indexer_loss",
    "indexer_select",
    "quantized_select",
    "refine_blocks",
    "topk_attention",
    "topk_attention_with_residual",
    "topk_select",
    "variable_width_cross_entropy",
    "variable_width_embedding",
]
