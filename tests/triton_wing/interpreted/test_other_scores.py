"""Selection by an indexer, by rounded rows and among some blocks in Triton, interpreted: what ranks a key, and which.

The options are those of topk_select, whose code they share; here stands what differs.
"""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import integers, normal
from ops import test_indexer_select as indexer
from ops import test_quantized_select as quantized
from ops import test_refine_blocks as refined

HALF, FLOAT = torch.bfloat16, torch.float32
RULE = {"is_causal": True, "causal_offset": 28, "window": 2, "sinks": 1}


@pytest.mark.parametrize("dtype", [FLOAT, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
def test_indexer(wing, dtype, int8):
    """Exact scores: rows of whole numbers that reach 127 lose nothing by the rounding."""
    query, key, weights = indexer.make(2, 2, 3, 7, 35, 6, dtype)
    query[..., 0], key[..., -1] = 127, -127
    options = RULE | {"key_lengths": torch.tensor([35, 30])}
    found = wing.indexer_select(query, key, weights.sign(), 5, int8=int8, **options)
    indexer.check(found, query, key, weights.sign(), 5, **options)


def test_indexer_of_special_values(wing):
    indexer.test_negative_scores_lose_to_none(wing)
    query, key, weights = indexer.make(1, 1, 2, 4, 20, 4)
    query[:, :, 1], key[:, :, 13] = torch.nan, torch.nan
    indices = wing.indexer_select(query, key, weights.abs() + 1, 3)
    assert indices[0, 0, 1].tolist() == [0, 1, 2]
    assert bool((indices[:, :, ::2] == 13).any(-1).all())


@pytest.mark.parametrize(("share", "dtype"), [("none", HALF), ("kv", FLOAT)])
def test_rounded(wing, share, dtype):
    query, key = normal(1, 4, 7, 20, dtype=dtype), normal(1, 2, 35, 20, dtype=dtype, seed=1)
    options = RULE | {"share": share, "scale": -0.5 if share == "none" else 0.5}
    found = wing.quantized_select(query, key, 6, **options)
    quantized.assert_best_of_rounded(found, query, key, 6, **options)


def test_rounded_special_values(wing):
    query, key = normal(1, 1, 3, 8).abs(), normal(1, 1, 20, 8, seed=1)
    query[:, :, 1, 2], key[:, :, 11, 2], query[:, :, 2] = torch.nan, -torch.inf, 0.0
    assert wing.quantized_select(query, key, 3)[0, 0].tolist()[1:] == [[0, 1, 2], [0, 1, 11]]


def test_rounded_rows_are_those_of_the_reference():
    from sparse_attn.triton_kernels.lib.round_rows import rounded
    from sparse_attn.wings.reference.rounding import rounded as reference

    rows = normal(2, 3, 50, 24) * torch.logspace(-30, 30, 50).view(-1, 1)
    rows[0, 0, 3], rows[1, 2, 7, 5], rows[1, 0, 2, 1] = 0.0, torch.nan, torch.inf
    for x in (rows, rows.bfloat16(), rows[..., ::2]):
        (codes, scales), (want, want_scale) = rounded(x), reference(x)
        assert torch.equal(codes.float(), want)
        torch.testing.assert_close(scales, want_scale.squeeze(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("share", "block", "tile"), [("none", 8, 4), ("none", 5, 40), ("kv", 8, 3), ("all", 1, 4)]
)
def test_among_blocks(wing, share, block, tile):
    """Several tiles in one of the kernel's, blocks across tiles of keys, and more of them than bits in a word."""
    make = integers if share == "none" else normal
    query, key = make(1, 4, 9, 6), make(1, 2, 70, 6, seed=1)
    options = {"is_causal": True, "causal_offset": 61, "window": 2, "sinks": 1}
    groups = 1 if share == "all" else 2
    blocks = refined.index_rows((1, groups, -(-9 // tile), 3), -(-70 // block), garbage=True)
    seen = refined.mask_of(blocks, tile, block, 9, 70, **options).repeat_interleave(4 // groups, dim=1)
    found = refined.run(wing, query, key, blocks, 6, block, tile, share=share, **options)
    check = refined.assert_identical if share == "none" else refined.assert_best
    check(found, query, key, 6, attn_mask=seen, share=share, **options)


def test_no_blocks_leaves_what_is_always_kept(wing):
    refined.test_no_blocks_leaves_what_is_always_kept(wing)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7), (2, 2, 1, 5, 0)], ids=str)
def test_nothing(wing, sizes):
    quantized.test_nothing(wing, FLOAT, sizes)
    refined.test_nothing(wing, FLOAT, (sizes[0], *sizes[3:]))
