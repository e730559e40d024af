"""Whole blocks and tails of blocks in Triton, interpreted: the kernels they share, one dtype for each case."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers.inputs import index_rows, normal, qkv
from ops import test_block_attention as blocks_of
from ops.test_softcap_and_sinks import with_gradients

import sparse_attn
from sparse_attn.ops import tail
from sparse_attn.rule import Rule
from sparse_attn.triton_kernels.lib import tile_chunks

HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "garbage"),
    [
        ("offset", HALF, False),
        ("one query", torch.float16, True),
        ("block beyond the keys", HALF, False),
        ("starts", FLOAT, True),
        ("large blocks", HALF, False),
        ("causal", FLOAT, True),
    ],
)
def test_block_attention(wing, name, dtype, garbage):
    blocks_of.test_forward_and_backward(wing, dtype, name, garbage)


def test_cap_and_sinks(wing):
    """Against the reference, with the gradients of the sinks."""
    inputs = qkv(1, 4, 2, 20, 40, 8, 5, dtype=FLOAT)
    blocks = index_rows((1, 2, 3, 2), 5)
    options = {"softcap": 0.7, "sink_logits": normal(4, seed=3), "is_causal": True, "causal_offset": 18}

    def call(*leaves, backend="triton", **options):
        return sparse_attn.block_attention(
            *leaves, blocks, block_size=8, query_tile=8, backend=backend, **options
        )

    ours, want = (
        with_gradients(partial(call, backend=backend), inputs, options) for backend in ("triton", "reference")
    )
    for mine, true in zip((*ours[0], *ours[2]), (*want[0], *want[2]), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("place", ["key", "value"])
def test_what_is_no_number(wing, place):
    value, dtype = (math.nan, HALF) if place == "value" else (math.inf, FLOAT)
    blocks_of.test_what_a_query_does_not_see_does_not_matter(wing, dtype, value, place)
    blocks_of.test_what_lies_past_the_lengths_has_no_gradient(wing, dtype, place)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7, 4, 4), (2, 2, 1, 5, 0, 4, 4)], ids=str)
def test_nothing(wing, sizes):
    blocks_of.test_nothing(wing, FLOAT, sizes, 2)


def test_no_slots(wing):
    blocks_of.test_nothing(wing, FLOAT, (2, 2, 1, 5, 7, 4, 4), 0)


def test_blocks_chosen_by_triton(wing):
    query, key, _ = qkv(1, 4, 2, 70, 70, 8)
    options = {"is_causal": True, "block_size": 16, "query_tile": 16, "share": "kv"}
    ours, want = (
        sparse_attn.block_select(query, key, 3, backend=b, **options) for b in ("triton", "reference")
    )
    assert torch.equal(ours, want)


TAILS = {  # dtype, G, the rule
    "starts": (FLOAT, 2, {"key_starts": torch.tensor([0, 60])}),
    "lengths": (HALF, 1, {"key_lengths": torch.tensor([200, 140]), "scale": 0.7}),
    "cap": (torch.float16, 4, {"is_causal": True, "causal_offset": 190, "softcap": 1.1}),
}


def of_tail(backend: str, dtype: torch.dtype, groups: int, options: dict) -> list[torch.Tensor]:
    """out, LSE and the gradients of query and means, where 200 keys make three blocks and some are chosen."""
    query, key, value = qkv(2, 4, 2, 10, 200, 8, dtype=dtype)
    indices = index_rows((2, groups, 10, 60), 200, garbage=True)
    packed = Rule(**options).packed(query, key)._replace(groups=groups)
    leaves = [t.requires_grad_() for t in (query, tail._means(key), tail._means(value))]
    out, lse = tail.BLOCKS.on(backend)(*leaves, indices, 200, 64, *packed.parts())
    grads = normal(*out.shape, seed=5, dtype=dtype), normal(*lse.shape, seed=6).where(lse > -math.inf, 0.0)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in chunks and pieces"])
def test_tail_of_blocks(wing, name, cut, monkeypatch):
    """Words of some queries at a time, and dK and dV in pieces that are added."""
    if cut:
        monkeypatch.setattr(tile_chunks, "SCRATCH_BYTES", 400)
        monkeypatch.setattr(tile_chunks, "SMALLEST", 16)
    dtype, *others = TAILS[name]
    for ours, want in zip(
        of_tail("triton", dtype, *others), of_tail("reference", dtype, *others), strict=True
    ):
        assert ours.dtype == want.dtype
        assert torch.equal(ours.isfinite(), want.isfinite())
        close = (
            {"rtol": 2e-2, "atol": 2e-2}
            if want.dtype in (HALF, torch.float16)
            else {"rtol": 1e-4, "atol": 1e-5}
        )
        torch.testing.assert_close(ours, want, **close)


def test_a_tail_with_nan(wing):
    query, key, value = qkv(1, 2, 1, 4, 128, 8)
    value[:, :, 70] = math.nan
    out = wing.topk_attention(query, key, value, 3, is_causal=True, causal_offset=124, tail="blocks")
    clean = wing.topk_attention(
        query, key, value.nan_to_num(0.0), 3, is_causal=True, causal_offset=124, tail="blocks"
    )
    assert torch.equal(out[:, :, :3], clean[:, :, :3])  # the last query alone sees the whole second block
    assert bool(out[:, :, 3].isnan().all())
