"""A few queries (decoding) have kernels of their own on the CPU: the same bits as among many queries."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_close
from helpers.inputs import LAYOUTS, OPTIONS, integers, normal, options_for, qkv
from helpers.wings import wings_under_test
from torch import Tensor

WINGS = [wing for wing in wings_under_test() if wing.name == "cpu"]
MANY = 17  # more queries than those kernels take

# B, Hq, Hkv, Tq, Tk, D
SIZES = {
    "one query": (1, 2, 2, 1, 5000, 64),
    "grouped heads": (2, 8, 2, 1, 1037, 128),
    "odd width": (1, 3, 1, 2, 700, 33),
    "one component": (1, 1, 1, 3, 257, 1),
    "widest": (1, 5, 1, 1, 300, 256),
    "many rows": (1, 9, 3, 16, 515, 72),
    "one key": (2, 2, 1, 2, 1, 8),
    "fewer keys than a vector": (1, 4, 2, 1, 5, 17),
}
SHARES = ("none", "kv", "all")


def among_many(wing, inputs, top_k, **options):
    """(out, lse, indices) of the same queries when MANY others stand behind them."""
    query = inputs[0]
    longer = torch.cat((query, query[:, :, :1].expand(-1, -1, MANY, -1)), dim=2)
    if options.get("attn_mask") is not None and options["attn_mask"].shape[-2] > 1:
        seen = options["attn_mask"]
        options["attn_mask"] = torch.cat((seen, seen[..., :1, :].expand(*seen.shape[:-2], MANY, -1)), dim=-2)
    if options.get("key_starts") is not None and options["key_starts"].dim() == 2:
        options["key_starts"] = torch.cat(
            (options["key_starts"], options["key_starts"].new_zeros(1, 1).expand(query.shape[0], MANY)), dim=1
        )
    results = wing.topk_attention(longer, *inputs[1:], top_k, return_lse=True, return_indices=True, **options)
    return [t[:, :, : query.shape[2]] for t in results]


def assert_same(wing, inputs, top_k, **options):
    want = among_many(wing, inputs, top_k, **options)
    gathers = top_k < 512  # of more keys a long call may sum in another order (dense tiles)
    ours = wing.topk_attention(*inputs, top_k, return_lse=True, return_indices=True, **options)
    for name, a, b in zip(("out", "lse", "indices"), ours, want, strict=True):
        if gathers or name == "indices":
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), f"{name} differs: {a} {b}"
        else:
            # The mean of thousands of values is far smaller than they are, and they are what is rounded.
            assert_close(a, b, f"{name}, top_k={top_k}", units=64 if a.dtype == torch.float32 else None)
        assert torch.equal(a.isnan(), b.isnan()), f"{name} is NaN elsewhere"
    assert torch.equal(wing.topk_select(*inputs[:2], top_k, **options), want[2])
    return want


def with_ties(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (2 * normal(*shape, seed=seed)).round().to(dtype)


@pytest.mark.parametrize("make", [normal, with_ties])
@pytest.mark.parametrize("case", SIZES)
def test_sizes(wing, dtype, case, make):
    sizes = SIZES[case]
    inputs = qkv(*sizes, dtype=dtype, make=make)
    for top_k in (1, 9, 200, sizes[4]):
        assert_same(wing, inputs, top_k)
    assert_same(wing, inputs, 20, is_causal=True, causal_offset=sizes[4] - sizes[3], sinks=3, window=6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", OPTIONS)
def test_rules(wing, dtype, name, share):
    inputs = qkv(2, 6, 3, 7, 300, 24, dtype=dtype)
    options = options_for(name, *inputs[:2])
    if options.get("is_causal"):
        options["causal_offset"] = 293 + options.get("causal_offset", 0)
    for top_k in (8, 90):
        assert_same(wing, inputs, top_k, share=share, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(wing, dtype, layout):
    inputs = [LAYOUTS[layout](t) for t in qkv(2, 4, 2, 2, 333, 40, dtype=dtype)]
    assert_same(wing, inputs, 21, is_causal=True, causal_offset=331)


@pytest.mark.parametrize("share", SHARES)
def test_special_values(wing, dtype, share):
    query, key, value = qkv(1, 4, 2, 3, 900, 16, dtype=dtype)
    for at, bad in enumerate((math.nan, math.inf, -math.inf, 3e38, 0.0)):
        key[0, at % 2, 100 * at + 5] = bad
    query[0, 1, 1, 3] = math.nan
    query[0, 2, 2] = 0.0
    for scale in (None, -1.0, 0.0):
        assert_same(wing, (query, key, value), 40, share=share, scale=scale)


@pytest.mark.torch_defaults
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "sizes",
    # All heads of a token together; two of eight, so much is kept of each; rows that end amid a vector.
    [(2, 4, 4, 1, 3000, 64), (1, 16, 8, 16, 1500, 16), (3, 3, 3, 2, 700, 33)],
    ids=["all", "some", "odd width"],
)
def test_heads_side_by_side(wing, dtype, sizes, share):
    """Keys token after token: the heads of a token are scanned together, or in parts."""
    query, *rows = qkv(*sizes, dtype=dtype, make=with_ties)
    tokens = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in rows]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for top_k, options in (
            (500, {}),
            (40, {"is_causal": True, "causal_offset": sizes[4] - 20, "window": 3}),
        ):
            found = wing.topk_attention(query, *tokens, top_k, return_indices=True, **options, share=share)[1]
            assert torch.equal(found, assert_same(wing, (query, *rows), top_k, share=share, **options)[2])
            assert_same(wing, (query, *tokens), top_k, share=share, **options)


@pytest.mark.torch_defaults
@pytest.mark.parametrize("share", SHARES)
def test_number_of_threads(wing, dtype, share):
    """Heads that no number of threads divides: their keys are split, and what ties stands in several parts."""
    inputs = qkv(1, 3, 1, 2, 9000, 16, dtype=dtype, make=with_ties)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            assert_same(wing, inputs, 100, share=share, is_causal=True, causal_offset=8990, window=5)
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("share", SHARES)
def test_the_best_by_the_oracle(wing, dtype, share):
    inputs = qkv(2, 4, 2, 4, 700, 20, dtype=dtype, make=integers)
    options = {"is_causal": True, "causal_offset": 600, "window": 3, "sinks": 2, "share": share}
    indices = wing.topk_select(*inputs[:2], 30, **options)
    assert_best(indices, *inputs[:2], 30, **options)
    if share == "none":
        assert torch.equal(indices, oracle.topk_select(*inputs[:2], 30, **options))
