"""Every check of a user's arguments, and the wording of every error.

One sentence per error: which argument, what came, what is accepted. All checks read shapes, dtypes and plain
numbers; the few that must read tensor values are marked and run only where that costs no device synchronisation.
"""

from sparse_attn.checks.attention import (
    blocks_of,
    indexer_weights,
    indices_of,
    keys,
    query_key,
    sequences,
    value_of,
)
from sparse_attn.checks.rule import (
    SHARES,
    budget,
    causal_offset_of,
    groups_of,
    kept,
    lengths_of,
    mask_of,
    offsets_of,
    sink_logits_of,
    soft_cap,
    softmax_scale,
    starts_of,
    tail_of,
    top_k_of,
)
from sparse_attn.checks.values import FLOAT_DTYPES, boolean, describe, integer, token_batch

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
    "integer",
    "kept",
    "keys",
    "lengths_of",
    "mask_of",
    "offsets_of",
    "query_key",
    "sequences",
    "sink_logits_of",
    "soft_cap",
    "softmax_scale",
    "starts_of",
    "tail_of",
    "token_batch",
    "top_k_of",
    "value_of",
]
