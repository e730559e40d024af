"""block_attention against gathered attention of the blocks' tokens, in float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import LAYOUTS, index_rows, normal, qkv

import sparse_attn
from sparse_attn.rule import PackedRule

CASES = {  # (B, Hq, Hkv, Tq, Tk, D, Dv), G, M, block, tile, options
    "plain": ((2, 4, 2, 33, 70, 9, 7), 4, 3, 16, 8, {}),
    "causal": ((1, 4, 2, 64, 64, 16, 16), 2, 3, 16, 16, {"is_causal": True}),
    "causal, one for all": ((2, 4, 2, 50, 50, 8, 12), 1, 4, 8, 16, {"is_causal": True, "scale": 0.3}),
    "offset": ((1, 3, 1, 20, 90, 64, 64), 1, 3, 24, 7, {"is_causal": True, "causal_offset": 60}),
    "odd sizes": ((1, 2, 2, 19, 101, 5, 3), 2, 5, 7, 3, {"is_causal": True, "causal_offset": 82}),
    "lengths": ((2, 2, 1, 40, 130, 8, 8), 1, 4, 32, 16, {"key_lengths": torch.tensor([130, 37])}),
    "starts": ((2, 2, 1, 40, 130, 8, 8), 1, 4, 32, 16, {"key_starts": torch.tensor([5, 41])}),
    "starts of queries": (
        (2, 4, 2, 50, 50, 8, 12),
        2,
        4,
        8,
        16,
        {"is_causal": True, "key_starts": torch.tensor([0] * 11 + [11] * 30 + [49] * 9).expand(2, 50)},
    ),
    "large blocks": ((1, 2, 1, 40, 300, 32, 40), 1, 2, 150, 64, {"is_causal": True, "causal_offset": 260}),
    "one query": ((2, 4, 2, 1, 257, 24, 24), 2, 3, 64, 64, {"is_causal": True, "causal_offset": 256}),
    "block beyond the keys": (
        (1, 2, 2, 9, 11, 8, 8),
        2,
        2,
        1000,
        1000,
        {"is_causal": True, "causal_offset": 2},
    ),
    "wide": ((1, 1, 1, 30, 128, 256, 200), 1, 2, 64, 32, {}),
}


def tokens(query, key, blocks, block, tile, options):
    """The indices of the tokens that each query attends to, int32 [B, G, Tq, M·block]."""
    position = blocks.long().unsqueeze(-1) * block + torch.arange(block)
    position = torch.where(blocks.unsqueeze(-1) < 0, -1, position).flatten(3)
    position = position.repeat_interleave(tile, dim=2)[:, :, : query.shape[2]]
    seen = oracle.visible(query, key, **options)[:, :1].expand(-1, position.shape[1], -1, -1)
    inside = (position >= 0) & (position < key.shape[2])
    inside &= seen.gather(-1, position.clamp(0, key.shape[2] - 1))
    return torch.where(inside, position, -1).int()


def make(name, dtype=torch.float32, garbage=False):
    sizes, groups, slots, block, tile, options = CASES[name]
    inputs = qkv(*sizes, dtype=dtype)
    shape = (sizes[0], groups, -(-sizes[3] // tile), slots)
    blocks = index_rows(shape, -(-sizes[4] // block), garbage=garbage)
    return inputs, blocks, {"block_size": block, "query_tile": tile, **options}


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(wing, dtype, name, garbage):
    inputs, blocks, options = make(name, dtype, garbage)
    leaves = [t.requires_grad_() for t in inputs]
    out, lse = wing.block_attention(*leaves, blocks, return_lse=True, **options)
    block, tile = options.pop("block_size"), options.pop("query_tile")
    indices = tokens(*inputs[:2], blocks, block, tile, options)
    scale = options.get("scale")
    want, want_lse = oracle.gathered_attention(*inputs, indices, scale)
    assert_close(out, want, "out")
    assert_close(lse, want_lse, "lse")
    grads = normal(*out.shape, dtype=dtype, seed=8), normal(*lse.shape, seed=9).where(lse > -math.inf, 0.0)
    ours = torch.autograd.grad((out, lse), leaves, grads)
    for name_, got, true in zip(
        ("dquery", "dkey", "dvalue"), ours, oracle.gradients(*inputs, indices, *grads, scale), strict=True
    ):
        # In the half types the incoming gradients of out and of lse are added before the rounding.
        assert_close(got, true, name_, units=None if dtype in (torch.float32, torch.float64) else 2)


def test_all_blocks_are_dense_attention(wing, dtype):
    query, key, value = qkv(2, 4, 2, 130, 130, 32, dtype=dtype)
    blocks = torch.arange(3, dtype=torch.int32).expand(2, 1, 3, 3)
    out = wing.block_attention(query, key, value, blocks, is_causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    assert_close(out, want, "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(wing, dtype, layout):
    inputs, blocks, options = make("causal", dtype)
    strided = [LAYOUTS[layout](t) for t in inputs]
    wide = LAYOUTS["every_second"](blocks)
    assert torch.equal(
        wing.block_attention(*strided, wide, **options), wing.block_attention(*inputs, blocks, **options)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["key", "value"])
def test_what_a_query_does_not_see_does_not_matter(wing, dtype, value, place):
    """NaN in a key or a value reaches the queries that see it, and no others of the tile."""
    query, key, values = qkv(1, 2, 2, 64, 64, 16, dtype=dtype)
    blocks = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4)
    options = {"block_size": 16, "query_tile": 64, "is_causal": True}
    clean = wing.block_attention(query, key, values, blocks, **options)
    broken = {"key": key.clone(), "value": values.clone()}
    broken[place][:, :, 37] = value
    out = wing.block_attention(query, broken["key"], broken["value"], blocks, **options)
    assert_close(out[:, :, :37], clean[:, :, :37].double(), "out")
    if math.isnan(value):
        assert bool(out[:, :, 37:].isnan().all())


@pytest.mark.parametrize("place", ["key", "value", "query", "grad_out"])
def test_the_gradient_of_what_a_query_does_not_see(wing, dtype, place):
    """NaN in one position spoils the gradients of what meets it, and no others of the CPU wing's tiles."""
    if wing.name != "cpu":
        pytest.skip("the other wings spoil the whole tile")
    query, key, values = qkv(1, 2, 2, 64, 64, 16, dtype=dtype)
    broken = {"query": query, "key": key, "value": values, "grad_out": normal(1, 2, 64, 16, dtype=dtype)}
    blocks = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4)
    options = {"block_size": 16, "query_tile": 64, "is_causal": True}

    def gradients():
        leaves = [broken[n].clone().requires_grad_() for n in ("query", "key", "value")]
        out = wing.block_attention(*leaves, blocks, **options)
        return torch.autograd.grad(out, leaves, broken["grad_out"])

    clean = gradients()
    broken[place] = broken[place].clone()
    broken[place][:, :, 37, 3] = math.nan
    dquery, dkey, dvalue = gradients()
    if place in ("key", "value"):  # queries from 37 on see it
        assert torch.equal(dquery[:, :, :37], clean[0][:, :, :37])
        assert bool(dquery[:, :, 37:].isnan().all())
    else:  # keys up to 37 are seen by it
        assert torch.equal(dquery[:, :, :37], clean[0][:, :, :37])
        assert torch.equal(dquery[:, :, 38:], clean[0][:, :, 38:])
        for got, want in ((dkey, clean[1]), (dvalue, clean[2])):
            assert torch.equal(got[:, :, 38:], want[:, :, 38:])
        assert bool(dkey[:, :, :38].isnan().all())


@pytest.mark.parametrize("place", ["key", "value"])
def test_what_lies_past_the_lengths_has_no_gradient(wing, dtype, place):
    inputs, blocks, options = make("lengths", dtype)
    broken = dict(zip(("query", "key", "value"), inputs, strict=True))
    broken[place][1, :, 37:] = math.nan
    leaves = [t.requires_grad_() for t in broken.values()]
    out = wing.block_attention(*leaves, blocks, **options)
    dquery, dkey, dvalue = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(t.isfinite().all()) for t in (out, dquery, dkey, dvalue))
    assert not dkey[1, :, 37:].any()
    assert not dvalue[1, :, 37:].any()


@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 5, 7, 4, 4), (2, 2, 1, 0, 7, 4, 4), (2, 2, 1, 5, 0, 4, 4)], ids=str
)
@pytest.mark.parametrize("slots", [0, 2])
def test_nothing(wing, dtype, sizes, slots):
    inputs = [t.requires_grad_() for t in qkv(*sizes, dtype=dtype)]
    blocks = torch.zeros(sizes[0], 1, -(-sizes[3] // 4), slots, dtype=torch.int32)
    out, lse = wing.block_attention(*inputs, blocks, query_tile=4, return_lse=True)
    assert out.shape == (*sizes[:2], sizes[3], 4)
    if slots == 0 or sizes[4] == 0:
        assert not out.any()
        assert bool((lse == -math.inf).all())
    assert all(
        g.shape == t.shape for g, t in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True)
    )


@pytest.mark.torch_defaults
def test_the_same_for_any_number_of_threads(wing, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs, blocks, options = make("causal", dtype)
        leaves = [t.requires_grad_() for t in inputs]
        out = wing.block_attention(*leaves, blocks, **options)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["plain", "lengths", "starts of queries", "odd sizes"])
def test_opcheck(wing, name):
    inputs, blocks, options = make(name)
    wing.block_attention(*inputs, blocks, **options)  # skips where the wing has none
    lengths, causal = options.get("key_lengths"), options.get("is_causal", False)
    numbers = causal, options.get("causal_offset", 0), 0, 0, blocks.shape[1]
    rule = PackedRule(None, lengths, *numbers, 0.3, options.get("key_starts"))
    leaves = [t.to(wing.device).requires_grad_() for t in inputs]
    sizes = options["block_size"], options["query_tile"]
    arguments = [*leaves, blocks.to(wing.device), *sizes, *rule.parts()]
    torch.library.opcheck(getattr(torch.ops.sparse_attn.block_attention, wing.name), arguments)


def test_compile_is_one_graph(wing):
    torch._dynamo.reset()
    inputs, _, _ = make("causal")
    inputs = [t.to(wing.device).requires_grad_() for t in inputs]

    def eager(query, key, value):
        blocks = sparse_attn.block_select(query, key, 2, block_size=16, query_tile=16, is_causal=True)
        options = {"block_size": 16, "query_tile": 16, "is_causal": True, "backend": wing.name}
        return sparse_attn.block_attention(query * 2, key, value, blocks, **options).relu()

    wing.block_attention(*inputs, torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for ours, want in zip(
        torch.autograd.grad(compiled(*inputs).sum(), inputs),
        torch.autograd.grad(eager(*inputs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, want)


QUERY, KEY, VALUE = qkv(2, 4, 2, 9, 40, 8)
BLOCKS = torch.zeros(2, 1, 3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "says", "wrong"),
    [
        (ValueError, r"N = ⌈Tq / query_tile⌉; here B=2, Hkv=2, Hq=4, N=3, got an int32 tensor of shape \[2, 1, 2, 2\]",
         {"blocks": BLOCKS[:, :, :2]}),
        (TypeError, "blocks must be int32", {"blocks": BLOCKS.float()}),
        (TypeError, "blocks must be an int32 tensor", {"blocks": None}),
        (ValueError, "block_size must be at least 1, got 0", {"block_size": 0}),
        (TypeError, "query_tile must be an int", {"query_tile": 2.0}),
        (ValueError, "needs causal_offset", {"is_causal": True}),
    ],
)  # fmt: skip
def test_errors(error, says, wrong):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "blocks": BLOCKS, "query_tile": 4}
    with pytest.raises(error, match=says):
        sparse_attn.block_attention(**arguments | wrong)
