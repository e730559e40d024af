"""The soft cap and the sinks in Triton, interpreted: the tests of the ops, each way through the kernels."""

from __future__ import annotations

import pytest
from helpers.inputs import index_rows, qkv
from ops.test_softcap_and_sinks import (  # noqa: F401
    check,
    scoring,
    test_a_row_that_sees_no_key,
    test_a_selection_per_head_is_the_same_bit_for_bit,
    test_heads_that_share_rank_by_capped_probabilities_with_their_sinks,
    test_saturation,
    test_special_values,
    test_the_cap_is_accurate_everywhere,
    test_topk_attention,
)


@pytest.mark.parametrize("which", ["softcap", "sink_logits", "both"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (3, 3)])
def test_gathered_attention(wing, dtype, which, heads, kv_heads):
    """In tiles of heads, and a head alone."""
    inputs = qkv(1, heads, kv_heads, 3, 20, 16, 8, dtype=dtype)
    indices = index_rows((1, kv_heads, 3, 7), 20, garbage=which == "both")
    check(
        lambda *qkv, **o: wing.gathered_attention(*qkv, indices, **o), inputs, indices, scoring(which, heads)
    )
