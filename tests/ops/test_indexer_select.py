"""indexer_select against its formula: exact inputs give the oracle's own indices, others the best scores."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from helpers import oracle
from helpers.compare import accumulation, assert_highest, assert_well_formed
from helpers.inputs import LAYOUTS, OPTIONS, integers, mask, normal, options_for

import sparse_attn
from sparse_attn.rule import PackedRule

NAMES = [name for name, options in OPTIONS.items() if "scale" not in options or name == "everything"]


def make(batch, groups, heads, queries, keys, dim, dtype=torch.float32, seed=0, kind=integers):
    """(query [B, G·Hi, Tq, D], key [B, G, Tk, D], weights [B, G·Hi, Tq])."""
    return (
        kind(batch, groups * heads, queries, dim, dtype=dtype, seed=seed),
        kind(batch, groups, keys, dim, dtype=dtype, seed=seed + 1),
        kind(batch, groups * heads, queries, dtype=dtype, seed=seed + 2),
    )


def check(
    indices, query, key, weights, top_k, *, exact: bool = True, unit: float | None = None, **options
) -> None:
    one_head = query[:, : key.shape[1]]  # for the contract the heads of a group are one
    assert_well_formed(indices, one_head, key, top_k, **options)
    rank = oracle.indexer_scores(query, key, weights)
    seen, kept = oracle.visible(one_head, key, **options), oracle.forced(one_head, key, **options)
    if exact:
        assert torch.equal(indices, oracle.select(rank, seen, kept, top_k))
        return
    # D products and sums per head, then one product and one sum per head.
    sizes = oracle.scores(query.abs(), key.abs(), 1.0) * weights.double().abs().unsqueeze(-1)
    sizes = sizes.unflatten(1, (key.shape[1], -1)).sum(2)
    error = (query.shape[3] + query.shape[1] + 4) * (unit or accumulation(query.dtype)) * sizes
    assert_highest(indices, rank, error, seen, kept)


@pytest.mark.parametrize("name", NAMES)
def test_options(wing, dtype, name):
    for number, (groups, heads, queries, keys) in enumerate([(1, 4, 17, 17), (2, 3, 9, 33), (3, 1, 33, 9)]):
        for kind in (integers, normal):
            inputs = make(2, groups, heads, queries, keys, 7, dtype, 10 * number, kind)
            options = options_for(name, *inputs[:2], seed=number)
            options.pop("scale", None)
            indices = wing.indexer_select(*inputs, 5, **options)
            check(indices, *inputs, 5, exact=kind is integers, **options)


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 31, 32, 64, 72, 128, 256])
@pytest.mark.parametrize("heads", [1, 2, 5, 64])
def test_sizes(wing, dtype, dim, heads):
    inputs = make(1, 2, heads, 19, 50, dim, dtype)
    check(wing.indexer_select(*inputs, 9), *inputs, 9)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 129, 1000])
def test_lengths_and_budgets(wing, dtype, length):
    queries = min(length, 65)
    inputs = make(1, 1, 3, queries, length, 6, dtype)
    options = {"is_causal": True, "causal_offset": length - queries}
    for top_k in {1, 8, length // 2 + 1, length + 1}:
        check(wing.indexer_select(*inputs, top_k, **options), *inputs, top_k, **options)


@pytest.mark.parametrize("top_k", [16, 300])
def test_long_rows(wing, dtype, top_k):
    inputs = make(1, 1, 4, 150, 2003, 32, dtype, kind=normal)
    options = {"is_causal": True, "causal_offset": 1853, "window": 8, "sinks": 4}
    check(wing.indexer_select(*inputs, top_k, **options), *inputs, top_k, exact=False, **options)


@pytest.mark.parametrize("dim", [1, 3, 4, 30, 64, 128])
def test_int8(wing, dtype, dim):
    """Rows that are whole numbers times a power of two, up to 127 of them, lose nothing by the rounding."""
    query, key, weights = make(2, 2, 3, 40, 90, dim, dtype, kind=partial(integers, largest=127))
    query[..., 0], key[..., -1] = 127, -127
    query, weights = query * 0.5, weights.sign()
    options = {"is_causal": True, "causal_offset": 50, "window": 3, "sinks": 1}
    check(
        wing.indexer_select(query, key, weights, 9, int8=True, **options), query, key, weights, 9, **options
    )


def test_int8_rounds(wing, dtype):
    """What is scored are the rounded rows."""
    query, key, weights = make(1, 1, 3, 30, 400, 24, dtype, kind=normal)
    numbers = [oracle.rounded(t) for t in (query, key)]
    indices = wing.indexer_select(query, key, weights, 20, int8=True)
    check(indices, *numbers, weights.double(), 20, exact=False, unit=accumulation(dtype))


def test_masks(wing):
    """A mask per group, broadcast and strided."""
    inputs = make(2, 2, 3, 14, 22, 6)
    for seen in (mask(2, 2, 14, 22), mask(22), mask(2, 1, 1, 22), mask(2, 2, 22, 14).mT, mask(14, 1)):
        check(wing.indexer_select(*inputs, 4, attn_mask=seen), *inputs, 4, attn_mask=seen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(wing, dtype, layout):
    query, key, weights = make(2, 2, 3, 9, 23, 11, dtype)
    strided = LAYOUTS[layout](weights.unsqueeze(-1)).squeeze(-1)
    indices = wing.indexer_select(LAYOUTS[layout](query), LAYOUTS[layout](key), strided, 5)
    assert torch.equal(indices, wing.indexer_select(query, key, weights, 5))


@pytest.mark.parametrize(
    "sizes", [(0, 1, 2, 5, 7), (2, 1, 2, 0, 7), (2, 1, 2, 5, 0), (0, 1, 1, 0, 0)], ids=str
)
def test_nothing(wing, dtype, sizes):
    inputs = make(*sizes, 4, dtype)
    indices = wing.indexer_select(*inputs, 3)
    assert indices.shape == (sizes[0], sizes[1], sizes[3], min(3, sizes[4]))
    assert indices.dtype == torch.int32


def test_negative_scores_lose_to_none(wing):
    """ReLU cuts a head's negative products to 0; a negative weight puts its keys last."""
    key = torch.tensor([[1.0], [-1.0], [2.0], [0.0]]).view(1, 1, 4, 1)
    query = torch.ones(1, 1, 1, 1)
    for weight, want in ((1.0, [0, 2]), (-1.0, [1, 3]), (0.0, [0, 1])):
        weights = torch.full((1, 1, 1), weight)
        assert wing.indexer_select(query, key, weights, 2).flatten().tolist() == want


def test_special_values(wing, dtype):
    """NaN ranks first and stays in its row; infinities rank as they are."""
    query, key, weights = make(1, 1, 2, 40, 70, 8, dtype)
    weights = weights.abs() + 1
    clean = wing.indexer_select(query, key, weights, 5)
    broken = query.clone()
    broken[:, :, 7] = math.nan
    indices = wing.indexer_select(broken, key, weights, 5)
    assert indices[0, 0, 7].tolist() == [0, 1, 2, 3, 4]
    rows = torch.arange(40) != 7
    assert torch.equal(indices[:, :, rows], clean[:, :, rows])
    broken = key.clone()
    broken[:, :, 50] = math.nan
    assert bool((wing.indexer_select(query, broken, weights, 5) == 50).any(-1).all())
    positive = query.abs() + 1
    broken = key.clone()
    broken[:, :, 60], broken[:, :, 61] = math.inf, -math.inf
    indices = wing.indexer_select(positive, broken, weights, 5)
    assert bool((indices == 60).any(-1).all())
    assert not bool((indices == 61).any())


@pytest.mark.torch_defaults
def test_the_same_for_any_number_of_threads(wing, dtype):
    inputs = make(2, 2, 3, 130, 300, 16, dtype, kind=normal)
    want = wing.indexer_select(*inputs, 20)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(wing.indexer_select(*inputs, 20), want)


def arguments(wing, variant):
    query, key, weights = (t.to(wing.device) for t in make(2, 2, 3, 6, 9, 8))
    if variant == "plain":
        return [query, key, weights, 4, *PackedRule(None, None, False, 0, 0, 0, 2, 1.0).parts(), False]
    seen, lengths = mask(2, 2, 6, 9).to(wing.device), torch.tensor([9, 7], device=wing.device)
    return [query, key, weights, 4, *PackedRule(seen, lengths, True, 3, 2, 1, 2, 1.0).parts(), True]


@pytest.mark.parametrize("variant", ["plain", "options"])
def test_opcheck(wing, variant):
    wing.indexer_select(*make(1, 1, 1, 1, 1, 1), 1)  # skips where the wing has none
    torch.library.opcheck(getattr(torch.ops.sparse_attn.indexer_select, wing.name), arguments(wing, variant))


def test_compile_is_one_graph(wing):
    torch._dynamo.reset()

    def eager(query, key, weights):
        options = {"is_causal": True, "causal_offset": key.shape[2] - query.shape[2], "backend": wing.name}
        return sparse_attn.indexer_select(query, key, weights, 4, window=1, **options) + 1

    wing.indexer_select(*make(1, 1, 1, 1, 1, 1), 1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    for batch, queries, keys in [(5, 11, 13), (3, 16, 40), (7, 3, 9)]:
        inputs = [t.to(wing.device) for t in make(batch, 2, 3, queries, keys, 8)]
        assert torch.equal(compiled(*inputs), eager(*inputs))
    assert counter.frame_count == 1


def test_autocast_and_gradients(wing):
    query, key, weights = make(1, 1, 3, 9, 9, 8, kind=normal)
    with torch.autocast(wing.device, dtype=torch.bfloat16):
        indices = wing.indexer_select(query, key, weights, 4)
    assert torch.equal(indices, wing.indexer_select(query.bfloat16(), key.bfloat16(), weights, 4))
    assert not wing.indexer_select(query.requires_grad_(), key, weights, 4).requires_grad


QUERY, KEY, WEIGHTS = make(2, 2, 3, 5, 7, 4)


@pytest.mark.parametrize(
    ("error", "says", "wrong"),
    [
        (ValueError, r"weights must have the shape .*\[2, 6, 5\], got a float32 tensor of shape \[2, 6\]",
         {"weights": WEIGHTS[..., 0]}),
        (TypeError, "weights must be float32, float16, bfloat16 or float64, got an int64",
         {"weights": WEIGHTS.long()}),
        (TypeError, r"weights must be a tensor of shape \[B, G·Hi, Tq\], got 1 \(int\)", {"weights": 1}),
        (ValueError, r"attn_mask must broadcast to \[B, G, Tq, Tk\] = \[2, 2, 5, 7\]",
         {"attn_mask": torch.ones(2, 6, 5, 7, dtype=torch.bool)}),
        (ValueError, "query heads must be a positive multiple", {"query": QUERY[:, :5]}),
        (ValueError, "is_causal with 5 queries and 7 keys needs causal_offset", {"is_causal": True}),
        (ValueError, "top_k must be at least 1", {"top_k": 0}),
        (ValueError, "window needs is_causal", {"window": 1}),
    ],
)  # fmt: skip
def test_errors(error, says, wrong):
    with pytest.raises(error, match=says):
        sparse_attn.indexer_select(**{"query": QUERY, "key": KEY, "weights": WEIGHTS, "top_k": 3} | wrong)
