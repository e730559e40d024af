"""The soft cap and the sinks of csrc/cuda on the simulated GPU: each way through the kernels, one dtype each."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import index_rows, qkv
from ops import test_softcap_and_sinks as of_the_ops
from ops.test_softcap_and_sinks import SCORING, check, scoring

from simt.wing import SimulatedWing

pytestmark = pytest.mark.slow
WINGS = [SimulatedWing()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("which", SCORING)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [(18, 1, torch.bfloat16), (3, 3, torch.float32), (3, 1, torch.float16)],
    ids=["tensor cores", "alone", "shared"],
)
def test_gathered_attention(wing, which, heads, kv_heads, dtype):
    inputs = qkv(1, heads, kv_heads, 3, 20, 16, 8, dtype=dtype)
    indices = index_rows((1, kv_heads, 3, 7), 20, garbage=which == "both")
    check(
        lambda *qkv, **o: wing.gathered_attention(*qkv, indices, **o), inputs, indices, scoring(which, heads)
    )


@pytest.mark.parametrize(
    ("share", "which", "dtype"), list(zip(("none", "kv", "all"), SCORING, DTYPES, strict=True))
)
def test_topk_attention(wing, share, which, dtype):
    of_the_ops.test_topk_attention(wing, dtype, which, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share(wing, dtype):
    of_the_ops.test_heads_that_share_rank_by_capped_probabilities_with_their_sinks(wing, dtype, "all")


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
    of_the_ops.test_saturation(wing, torch.float32, 30.0)
