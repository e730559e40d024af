"""The pure-PyTorch wing: the definition of every op, the oracle of the tests, the MPS path and the fallback."""

from __future__ import annotations

import torch

from sparse_attn.wings.base import Wing, register
from sparse_attn.wings.reference.block_attention import block_attention, block_attention_backward
from sparse_attn.wings.reference.gathered_attention import gathered_attention, gathered_attention_backward
from sparse_attn.wings.reference.indexer_select import indexer_select
from sparse_attn.wings.reference.quantized_select import quantized_select
from sparse_attn.wings.reference.refine_blocks import refine_blocks
from sparse_attn.wings.reference.topk_attention import topk_attention
from sparse_attn.wings.reference.topk_select import topk_select
from sparse_attn.wings.reference.variable_width_cross_entropy import (
    variable_width_cross_entropy,
    variable_width_cross_entropy_backward,
)
from sparse_attn.wings.reference.variable_width_embedding import (
    variable_width_embedding,
    variable_width_embedding_backward,
)


def _why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64 and device_type == "mps":
        return "MPS has no float64"
    return None


REFERENCE_WING = Wing(
    name="reference",
    dispatch_key="CompositeExplicitAutograd",
    implementations={
        "topk_select": topk_select,
        "quantized_select": quantized_select,
        "indexer_select": indexer_select,
        "gathered_attention": gathered_attention,
        "gathered_attention_backward": gathered_attention_backward,
        "refine_blocks": refine_blocks,
        "block_attention": block_attention,
        "block_attention_backward": block_attention_backward,
        "topk_attention": topk_attention,
        "variable_width_embedding": variable_width_embedding,
        "variable_width_embedding_backward": variable_width_embedding_backward,
        "variable_width_cross_entropy": variable_width_cross_entropy,
        "variable_width_cross_entropy_backward": variable_width_cross_entropy_backward,
    },
    why_not=_why_not,
)
register(REFERENCE_WING)
