"""The soft cap and the sinks in Triton, interpreted: each way through the kernels, one dtype each."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import index_rows, qkv
from ops import test_softcap_and_sinks as of_the_ops
from ops.test_softcap_and_sinks import SCORING, check, scoring, test_the_cap_is_accurate_everywhere  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("number", range(6))
def test_gathered_attention(wing, number):
    """In tiles of heads (8 share a key head), and a head alone."""
    which, (heads, kv_heads), dtype = SCORING[number % 3], ((8, 1), (3, 3))[number // 3], DTYPES[number % 2]
    inputs = qkv(1, heads, kv_heads, 3, 20, 16, 8, dtype=dtype)
    indices = index_rows((1, kv_heads, 3, 7), 20, garbage=which == "both")
    check(
        lambda *qkv, **o: wing.gathered_attention(*qkv, indices, **o), inputs, indices, scoring(which, heads)
    )


@pytest.mark.parametrize(
    ("share", "which", "dtype"), list(zip(("none", "kv", "all"), SCORING, DTYPES, strict=True))
)
def test_topk_attention(wing, share, which, dtype):
    rule = {"is_causal": True, "causal_offset": 10, "window": 2, "sinks": 1, "share": share}

    def function(*qkv, **options):
        return wing.topk_attention(*qkv, 5, return_indices=True, **options)

    inputs = qkv(1, 4, 2, 4, 14, 16, 8, dtype=dtype)
    check(function, inputs, None, rule | scoring(which, 4, softcap=0.7))


def test_heads_that_share(wing):
    of_the_ops.test_heads_that_share_rank_by_capped_probabilities_with_their_sinks(wing, torch.float32, "all")


def test_a_selection_per_head(wing):
    of_the_ops.test_a_selection_per_head_is_the_same_bit_for_bit(wing, torch.float32)


@pytest.mark.parametrize(
    "test",
    [of_the_ops.test_a_row_that_sees_no_key, of_the_ops.test_special_values],
    ids=["no key", "special"],
)
def test_special(wing, test):
    test(wing, torch.float32)


def test_saturation(wing):
    of_the_ops.test_saturation(wing, torch.bfloat16, 30.0)
