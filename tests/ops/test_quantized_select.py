"""quantized_select: the oracle's selection of the rounded queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import accumulation, assert_highest, assert_identical, assert_well_formed, rank_errors
from helpers.inputs import LAYOUTS, OPTIONS, integers, mask, normal, options_for

import sparse_attn
from sparse_attn.rule import PackedRule


def whole(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Whole numbers with a 127 in each row: rounding changes nothing, and their sums are exact."""
    rows = integers(*shape, dtype=dtype, seed=seed, largest=127)
    rows[..., seed % shape[-1]] = 127
    return rows


def assert_best_of_rounded(indices, query, key, top_k, **options) -> None:
    assert_well_formed(indices, query, key, top_k, **options)
    unit = accumulation(query.dtype) / accumulation(torch.float64)  # the rounded rows are float64
    query, key = oracle.rounded(query), oracle.rounded(key)
    rank, count = oracle.ranks(query, key, **options), indices.shape[1]
    error = rank_errors(query, key, **options) * unit
    seen = oracle.first_of_group(oracle.visible(query, key, **options), count)
    assert_highest(indices, rank, error, seen, oracle.forced(query, key, **options))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("share", ["none", "kv", "all"])
def test_options(wing, dtype, name, share):
    for number, (heads, kv_heads, queries, keys) in enumerate([(4, 2, 17, 17), (3, 3, 9, 33), (3, 1, 33, 9)]):
        query = normal(2, heads, queries, 7, dtype=dtype, seed=number)
        key = normal(2, kv_heads, keys, 7, dtype=dtype, seed=number + 50)
        options = options_for(name, query, key, seed=number) | {"share": share}
        assert_best_of_rounded(wing.quantized_select(query, key, 5, **options), query, key, 5, **options)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 31, 64, 72, 128, 256])
def test_exact_scores(wing, dtype, dim):
    query, key = whole(1, 2, 50, dim, dtype=dtype, seed=1), whole(1, 1, 300, dim, dtype=dtype, seed=2)
    for options in ({}, {"is_causal": True, "causal_offset": 250, "window": 4, "sinks": 2, "scale": -1.0}):
        indices = wing.quantized_select(query, key, 19, **options)
        assert_identical(indices, query, key, 19, **options)


@pytest.mark.parametrize("share", ["none", "kv"])
def test_long_rows(wing, dtype, share):
    query, key = normal(1, 4, 40, 64, dtype=dtype), normal(1, 2, 3001, 64, dtype=dtype, seed=1)
    options = {"is_causal": True, "causal_offset": 2961, "window": 5, "share": share}
    for top_k in (20, 400):
        assert_best_of_rounded(
            wing.quantized_select(query, key, top_k, **options), query, key, top_k, **options
        )


@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-30, 1e30])
def test_magnitudes(wing, magnitude):
    """Rows of any size, also below the normal range, where a scale is too coarse to be exact."""
    query, key = normal(1, 1, 8, 16), magnitude * normal(1, 1, 200, 16, seed=1)
    indices = wing.quantized_select(query, key, 10, scale=1.0)
    assert_well_formed(indices, query, key, 10)
    if magnitude in (1e-30, 1e30):
        assert_best_of_rounded(indices, query, key, 10, scale=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(wing, dtype, layout):
    query, key = normal(2, 4, 9, 11, dtype=dtype), normal(2, 2, 23, 11, dtype=dtype, seed=1)
    indices = wing.quantized_select(LAYOUTS[layout](query), LAYOUTS[layout](key), 5)
    assert torch.equal(indices, wing.quantized_select(query, key, 5))


def test_special_values(wing, dtype):
    """A row of zeros scores 0; one with NaN or an infinity scores NaN, and disturbs no other."""
    query, key = normal(1, 1, 20, 8, dtype=dtype).abs(), normal(1, 1, 60, 8, dtype=dtype, seed=1)
    clean = wing.quantized_select(query, key, 6)
    for value in (math.nan, math.inf, -math.inf):
        broken = query.clone()
        broken[:, :, 3, 2] = value
        indices = wing.quantized_select(broken, key, 6)
        assert indices[0, 0, 3].tolist() == [0, 1, 2, 3, 4, 5]
        rows = torch.arange(20) != 3
        assert torch.equal(indices[:, :, rows], clean[:, :, rows])
        broken = key.clone()
        broken[:, :, 31, 2] = value
        assert bool((wing.quantized_select(query, broken, 6) == 31).any(-1).all())
    zero = wing.quantized_select(query * 0, key, 6)
    assert bool((zero == torch.arange(6)).all())


@pytest.mark.parametrize("sizes", [(0, 2, 1, 5, 7), (2, 2, 1, 0, 7), (2, 2, 1, 5, 0)], ids=str)
def test_nothing(wing, dtype, sizes):
    batch, heads, kv_heads, queries, keys = sizes
    query, key = (normal(batch, h, n, 4, dtype=dtype) for h, n in ((heads, queries), (kv_heads, keys)))
    assert wing.quantized_select(query, key, 3).shape == (batch, heads, queries, min(3, keys))


def test_close_to_exact(wing):
    """The selection that rounding is for: nearly all of the exact one."""
    query, key = normal(1, 2, 50, 64), normal(1, 2, 2000, 64, seed=1)
    exact, ours = wing.topk_select(query, key, 64), wing.quantized_select(query, key, 64)
    common = (exact.unsqueeze(-1) == ours.unsqueeze(-2)).any(-1).double().mean()
    assert common > 0.95


@pytest.mark.parametrize("variant", ["plain", "options"])
def test_opcheck(wing, variant):
    query, key = normal(2, 4, 6, 8), normal(2, 2, 9, 8, seed=1)
    wing.quantized_select(query, key, 4)  # skips where the wing has none
    rule = PackedRule(None, None, False, 0, 0, 0, 4, 0.3)
    if variant == "options":
        rule = PackedRule(mask(2, 2, 6, 9), torch.tensor([9, 7]), True, 3, 2, 1, 2, 0.3)
    arguments = (query, key, 4, *rule.parts(), True, None, 1, 1)
    inputs = [t.to(wing.device) if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(getattr(torch.ops.sparse_attn.topk_select, wing.name), inputs)


def test_compile_is_one_graph(wing):
    torch._dynamo.reset()

    def eager(query, key):
        options = {"is_causal": True, "share": "kv", "backend": wing.name}
        return sparse_attn.quantized_select(query, key, 4, **options) + 1

    query, key = normal(2, 4, 9, 8), normal(2, 2, 9, 8, seed=1)
    wing.quantized_select(query, key, 4)
    query, key = query.to(wing.device), key.to(wing.device)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), eager(query, key))


def test_errors():
    with pytest.raises(ValueError, match="share must be one of"):
        sparse_attn.quantized_select(normal(1, 2, 3, 4), normal(1, 2, 3, 4), 2, share="some")
    with pytest.raises(ValueError, match="one head dimension D"):
        sparse_attn.quantized_select(normal(1, 2, 3, 4), normal(1, 2, 3, 5), 2)
