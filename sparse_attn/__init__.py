"""Top-k gathered sparse attention for PyTorch: `sparse_attn.topk_attention(q, k, v, top_k=…)`."""

from importlib import import_module as _import_module
from typing import Any as _Any

from sparse_attn import nn, selection
from sparse_attn.ops.block_attention import block_attention
from sparse_attn.ops.block_select import block_select
from sparse_attn.ops.gathered_attention import gathered_attention
from sparse_attn.ops.indexer_loss import indexer_loss
from sparse_attn.ops.indexer_select import indexer_select
from sparse_attn.ops.key_index import KeyIndex
from sparse_attn.ops.paged_index import PagedKeyIndex
from sparse_attn.ops.shards import state as _shards
from sparse_attn.ops.topk_attention import explain, topk_attention, topk_attention_with_residual
from sparse_attn.ops.topk_select import quantized_select, refine_blocks, topk_select
from sparse_attn.ops.variable_width_cross_entropy import variable_width_cross_entropy
from sparse_attn.ops.variable_width_embedding import variable_width_embedding
from sparse_attn.ops.varlen import (
    varlen_gathered_attention,
    varlen_indexer_select,
    varlen_topk_attention,
    varlen_topk_select,
)
from sparse_attn.ops.varlen_blocks import varlen_block_attention, varlen_block_select
from sparse_attn.planner import WidthPlan, plan_widths
from sparse_attn.selection import attend
from sparse_attn.wings.base import explain_call, use_backend

__version__ = "0.1.0"
__all__ = [
    "KeyIndex",
    "PagedKeyIndex",
    "WidthPlan",
    "attend",
    "block_attention",
    "block_select",
    "explain",
    "explain_call",
    "gathered_attention",
    "indexer_loss",
    "indexer_select",
    "nn",
    "plan_widths",
    "quantized_select",
    "refine_blocks",
    "selection",
    "topk_attention",
    "topk_attention_with_residual",
    "topk_select",
    "use_backend",
    "variable_width_cross_entropy",
    "variable_width_embedding",
    "varlen_block_attention",
    "varlen_block_select",
    "varlen_gathered_attention",
    "varlen_indexer_select",
    "varlen_topk_attention",
    "varlen_topk_select",
]


def __getattr__(name: str) -> _Any:
    # What needs DTensor, which takes half a second to import, only where it is asked for.
    if name == "distributed":
        return _import_module("sparse_attn.distributed")
    raise AttributeError(f"module 'sparse_attn' has no attribute {name!r}")


def _on_dtensors(*arguments: _Any) -> _Any:
    from sparse_attn.distributed.rules import on_dtensors

    return on_dtensors(*arguments)


_shards.on_dtensors = _on_dtensors
