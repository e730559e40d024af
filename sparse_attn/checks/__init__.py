"""Every check of a user's arguments, and the wording of every error.

One sentence per error: which argument, what came, what is accepted. All checks read shapes, dtypes and plain
numbers; the few that must read tensor values are marked and run only where that costs no device synchronisation.
"""

from sparse_attn.checks.attention import blocks_of, indexer_weights, indices_of, query_key, value_of
from sparse_attn.checks.rule import (
    SHARES,
    budget,
    causal_offset_of,
    groups_of,
    kept,
    lengths_of,
    mask_of,
    softmax_scale,
    starts_of,
    top_k_of,
)
from sparse_attn.checks.values import FLOAT_DTYPES, boolean, describe, inference_only, integer, token_batch

__all__ = [
    "FLOAT_DTYPES",
    "SHARES",
    "blocks_of",
    "boolean",
    "budget",
    "causal_offset_of",
    "describe",
    "groups_of",
    "indexer_weights",
    "indices_of",
    "inference_only",
    "integer",
    "kept",
    "lengths_of",
    "mask_of",
    "query_key",
    "softmax_scale",
    "starts_of",
    "token_batch",
    "top_k_of",
    "value_of",
]
