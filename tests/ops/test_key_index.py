"""A key index changes what a selection costs, never what it is."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best
from helpers.inputs import LAYOUTS, OPTIONS, integers, normal, options_for, qkv
from helpers.wings import overload, wings_under_test

import sparse_attn
from sparse_attn import KeyIndex
from sparse_attn.ops.key_index import WRITE
from sparse_attn.selection import Rule

WINGS = [wing for wing in wings_under_test() if wing.refuses("indexed_select") is None or wing.missing]


def outliers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A mean far from zero and components of very different size, as models have them."""
    sizes = torch.linspace(-3, 1, shape[-1]).exp()
    return ((normal(*shape, seed=seed) + 4 * normal(shape[-1], seed=9)) * sizes).to(dtype)


def alike(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Vectors that hardly differ: bounds that say little."""
    return (1 + 1e-3 * normal(*shape, seed=seed)).to(dtype)


def assert_same(wing, inputs, top_k, *, index=None, **options):
    query, key, value = (t.to(wing.device) for t in inputs)
    index = index or KeyIndex.of(key)
    flags = {"return_lse": True, "return_indices": True}
    want = wing.topk_attention(query, key, value, top_k, **flags, **options)
    ours = wing.topk_attention(query, key, value, top_k, key_index=index, **flags, **options)
    for name, a, b in zip(("out", "lse", "indices"), ours, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), f"{name} differs: {a} {b}"
        assert torch.equal(a.isnan(), b.isnan()), f"{name} is NaN elsewhere"
    assert torch.equal(wing.topk_select(query, key, top_k, key_index=index, **options), want[2])
    return want[2]


@pytest.mark.parametrize("make", [normal, outliers, alike, integers])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 2, 1, 5000, 64),
        (2, 8, 2, 1, 700, 128),
        (1, 7, 1, 3, 1030, 33),
        (1, 2, 1, 16, 400, 1),
        (1, 1, 1, 2, 5, 256),
    ],
)
def test_sizes(wing, dtype, sizes, make):
    inputs = qkv(*sizes, dtype=dtype, make=make)
    for top_k in (1, 30, 300):
        assert_same(wing, inputs, top_k)


@pytest.mark.parametrize("name", OPTIONS)
def test_rules(wing, dtype, name):
    inputs = qkv(2, 6, 3, 5, 600, 24, dtype=dtype)
    options = options_for(name, *inputs[:2])
    if options.get("is_causal"):
        options["causal_offset"] = 595 + options.get("causal_offset", 0)
    assert_same(wing, inputs, 8, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(wing, dtype, layout):
    assert_same(wing, [LAYOUTS[layout](t) for t in qkv(2, 4, 2, 2, 333, 40, dtype=dtype)], 21)


@pytest.mark.parametrize("share", ["kv", "all"])
def test_where_it_does_not_serve(wing, share):
    """A shared selection, and many queries: the index is looked at and left alone."""
    inputs = qkv(1, 4, 2, 2, 300, 16)
    assert_same(wing, inputs, 9, share=share)
    assert_same(wing, qkv(1, 4, 2, 17, 300, 16), 9)
    with pytest.raises(ValueError, match="it knows 299, key has 300"):
        wing.topk_select(*inputs[:2], 9, share=share, key_index=KeyIndex.of(inputs[1][:, :, :299]))


def test_special_values(wing, dtype):
    query, key, value = qkv(1, 4, 2, 2, 900, 16, dtype=dtype)
    for at, bad in enumerate((math.nan, math.inf, -math.inf, 3e38, 1e30, 1e-38)):
        key[0, at % 2, 100 * at + 5] = bad
    query[0, 1, 1, 3] = math.nan
    query[0, 2, 0] = 0.0
    assert_same(wing, (query, key, value), 40)
    assert_same(wing, (query[:, :, :1], key, value), 40, scale=-1.0)
    assert_same(wing, (query[:, :, :1], key, value), 40, scale=0.0)
    assert_same(wing, (query * 1e-30, key, value), 40)
    assert_same(wing, (query, torch.zeros_like(key), value), 40)


@pytest.mark.torch_defaults
def test_number_of_threads(wing, dtype):
    inputs = qkv(1, 3, 1, 2, 9000, 16, dtype=dtype, make=outliers)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(assert_same(wing, inputs, 100, is_causal=True, causal_offset=8990, window=5))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_best_by_the_oracle(wing, dtype):
    query, key, _ = qkv(2, 4, 2, 4, 700, 20, dtype=dtype, make=integers)
    options = {"is_causal": True, "causal_offset": 600, "window": 3, "sinks": 2}
    index = KeyIndex.of(key.to(wing.device))
    indices = wing.topk_select(query, key, 30, key_index=index, **options)
    assert_best(indices, query, key, 30, **options)
    assert torch.equal(indices, oracle.topk_select(query, key, 30, **options))


def test_the_bounds_decide(wing):
    """Where the index says of every second key that it is nothing, no such key is chosen: nothing else hides it."""
    query, key, _ = qkv(1, 8, 2, 16, 5000, 64)
    index = KeyIndex.of(key.to(wing.device))
    index.bounds[..., 1::2] = 0.0
    wrong = wing.topk_select(query, key, 10, key_index=index)
    assert not torch.equal(wrong, wing.topk_select(query, key, 10))


def rows_of(index: KeyIndex) -> torch.Tensor:
    """The rounded keys in float64, [B, Hkv, T, D], their shift added again."""
    numbers = (
        index.codes.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[..., : index.shift.shape[2]].double()
    )
    scale = index.bounds[:, :, :, 0].flatten(2).double().unsqueeze(-1)
    return (numbers * scale + index.shift.double().unsqueeze(2))[:, :, : index.length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [normal, outliers, alike, integers])
def test_what_it_says_of_the_keys(make, dtype):
    key = make(2, 3, 77, 21, dtype=dtype, seed=1)
    index = KeyIndex.of(key)
    error, norm = (index.bounds[:, :, :, n].flatten(2)[:, :, : index.length].double() for n in (1, 2))
    assert bool(((key.double() - rows_of(index)).norm(dim=-1) <= error).all())
    shifted = (key.double() - index.shift.double().unsqueeze(2)).norm(dim=-1)
    assert bool((shifted <= norm).all())
    assert bool((norm <= shifted * 1.00001).all())
    assert bool((error <= shifted * 21**0.5 / 127).all())  # half a step each, and as much again
    assert int(index.codes.min()) >= -127


def same_keys(a: KeyIndex, b: KeyIndex) -> bool:
    assert a.length == b.length
    return torch.equal(rows_of(a), rows_of(b)) and all(
        torch.equal(*(t.bounds.transpose(3, 4).flatten(2, 3)[:, :, : a.length] for t in (a, b))) for _ in (0,)
    )


def test_append():
    """In whatever pieces, with room or without."""
    key = normal(2, 3, 200, 10, seed=1)
    whole = KeyIndex.of(key[:, :, :40]).append(key[:, :, 40:])
    for pieces in ([1] * 160, [7, 30, 3, 64, 56], [16] * 10, [0, 159, 1]):
        for capacity in (0, 57, 300):
            index = KeyIndex.of(key[:, :, :40], capacity=capacity)
            rows = index.codes.data_ptr()
            for piece in key[:, :, 40:].split(pieces, dim=2):
                index.append(piece)
            assert same_keys(index, whole)
            if capacity == 300:
                assert index.codes.data_ptr() == rows  # nothing was moved
    assert same_keys(KeyIndex.of(key[:, :, :0]).append(key), KeyIndex(*_empty(key)).append(key))


def _empty(key):
    index = KeyIndex.of(key[:, :, :0])
    return index.codes, index.bounds, index.shift, 0, key.dtype


@pytest.mark.skipif(not WINGS or bool(WINGS[0].missing), reason="the CPU wing writes it by a kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [normal, outliers, alike, integers])
@pytest.mark.parametrize("sizes", [(2, 3, 77, 21), (1, 1, 1, 1), (1, 2, 33, 64), (2, 1, 50, 200)])
def test_kernel_and_definition(make, dtype, sizes):
    """The same whole numbers but where rounding is a tie, and bounds that differ by less than a thousandth."""
    key = make(*sizes, dtype=dtype, seed=1)
    key[:, :, ::9] *= 1e-14 if dtype == torch.float32 else 0.0
    index = KeyIndex.of(key)
    codes, bounds = torch.zeros_like(index.codes), torch.zeros_like(index.bounds)
    overload("index_keys", "reference")(key, codes, bounds, index.shift, 0)
    assert int((codes.int() - index.codes.int()).abs().max()) <= 1
    assert (codes != index.codes).float().mean() < 1e-2
    torch.testing.assert_close(index.bounds, bounds, rtol=2e-3, atol=1e-30)


@pytest.mark.parametrize("wing_name", ["cpu", "reference"])
def test_writing_is_an_op(wing_name):
    key = normal(1, 2, 40, 10, seed=1)
    if not WRITE.has(wing_name):
        pytest.skip("the extension is not built")
    index = KeyIndex.of(key)
    arguments = key, index.codes.clone(), index.bounds.clone(), index.shift, 3
    torch.library.opcheck(overload("index_keys", wing_name), arguments)


def test_layouts_of_keys():
    key = normal(2, 3, 90, 20, seed=1)
    for layout in LAYOUTS.values():
        index = KeyIndex.of(key)  # of one shift: a mean's bits depend on the layout
        assert same_keys(KeyIndex.of(key).crop(0).append(layout(key)), index)


@pytest.mark.torch_defaults
def test_keys_split_over_threads(wing, dtype):
    """Parts whose bounds are put together, and parts in which they are of no use."""
    torch.set_num_threads(2)
    query, key, value = qkv(1, 9, 3, 1, 6000, 32, dtype=dtype, make=outliers)
    assert_same(wing, (query, key, value), 100)
    assert_same(wing, (query, key, value), 100, is_causal=True, causal_offset=4100, window=7, sinks=3)
    spoiled = key.clone()
    spoiled[:, 1, 2500:3900] = spoiled[:, 1, 2500:2501]  # ties
    spoiled[:, 2, 10] = math.nan
    assert_same(wing, (query, spoiled, value), 100)
    spoiled[:, :, :2100] = 1.0
    assert_same(wing, (query, spoiled, value), 100)


def test_reorder_and_crop(wing):
    query, key, value = qkv(3, 2, 2, 1, 300, 16)
    index = KeyIndex.of(key.to(wing.device))
    beams = torch.tensor([2, 0, 2])
    assert index.reorder(beams.to(wing.device)) is index
    assert_same(wing, (query, key[beams], value), 20, index=index)
    assert index.crop(123).length == 123
    again = torch.cat((key[beams][:, :, :123], normal(3, 2, 20, 16, seed=5)), dim=2)
    index.append(again[:, :, 123:].to(wing.device))
    assert_same(
        wing, (query, again, torch.cat((value[:, :, :123], value[:, :, :20]), dim=2)), 20, index=index
    )
    assert index.crop(-3).length == 140


def test_gradients(wing):
    inputs = [t.requires_grad_() for t in qkv(1, 4, 2, 2, 300, 16)]
    results = []
    for index in (None, KeyIndex.of(inputs[1].detach())):
        out, lse = wing.topk_attention(*inputs, 9, return_lse=True, key_index=index)
        results.append(torch.autograd.grad((out.square().sum() + lse.sum()), inputs))
    for ours, want in zip(*results, strict=True):
        assert torch.equal(ours, want)


def test_op(wing):
    query, key, value = (t.to(wing.device) for t in qkv(1, 2, 1, 2, 60, 9))
    index = KeyIndex.of(key)
    rule = Rule(scale=1.0).packed(query, key, 5)
    others = 5, *rule.parts(), index.codes, index.bounds, index.shift
    torch.library.opcheck(overload("indexed_select", wing.name), (query, key, *others))
    torch.library.opcheck(overload("indexed_attention", wing.name), (query, key, value, *others))


@pytest.mark.skipif(not WINGS or bool(WINGS[0].missing), reason="the CPU wing has several ways")
def test_explain_says_the_way():
    query, key, value = qkv(1, 2, 2, 17, 50, 8)
    one, index = query[:, :, :1], KeyIndex.of(key)
    assert "keys are packed" in str(sparse_attn.explain(query, key, value, 5, key_index=index))
    assert "each key is read once" in str(sparse_attn.explain(one, key, value, 5))
    assert "each key is read once" in str(
        sparse_attn.explain(one, key, value, 5, share="all", key_index=index)
    )
    assert "the key index" in str(sparse_attn.explain(one, key, value, 5, key_index=index))
    assert sparse_attn.explain(one, key, value, 5, backend="reference").way is None


@pytest.mark.skipif(not WINGS or bool(WINGS[0].missing), reason="the wings that have it")
def test_refusals():
    query, key, value = qkv(2, 4, 2, 1, 50, 8)
    index = KeyIndex.of(key)

    def refused(error, says, **change):
        given = {"query": query, "key": key, "key_index": index} | change
        with pytest.raises(error, match=says):
            sparse_attn.topk_select(given["query"], given["key"], 5, key_index=given["key_index"])

    refused(TypeError, r"key_index must be a sparse_attn.KeyIndex, got 3 \(int\)", key_index=3)
    refused(ValueError, "it knows 50, key has 49", key=key[:, :, :49])
    refused(
        TypeError, "key_index is one of torch.float32 keys, got key torch.bfloat16",
        query=query.bfloat16(), key=key.bfloat16(),
    )  # fmt: skip
    refused(ValueError, r"key_index has B=2, Hkv=2, D=8, got key .* = \[2, 1, 50, 8\]", key=key[:, :1])
    refused(ValueError, "key_index is on cpu, got key on meta", query=query.to("meta"), key=key.to("meta"))
    with pytest.raises(ValueError, match="key_index has B=2, Hkv=2, D=8"):
        index.append(key[:1])
    with pytest.raises(TypeError, match="key must be a tensor of shape"):
        KeyIndex.of([1.0])
    with pytest.raises(IndexError, match="beam_idx must name sequences 0 … 1, got 2"):
        index.reorder(torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="beam_idx must be an int64"):
        index.reorder(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="length must be at most 50, got 51"):
        index.crop(51)
    for says, change in {
        "codes must be a tensor of int8, got a float32": {"codes": index.codes.float()},
        "bounds must be a tensor of float32, got None": {"bounds": None},
        "codes must have shape .* and shift": {"codes": index.codes[0]},
        "bounds must have shape .* beside shift": {"bounds": index.bounds[:, :, :1]},
        "length must be at most 64, got 65": {"length": 65},
        "length must be an int": {"length": "50"},
    }.items():
        parts = {"codes": index.codes, "bounds": index.bounds, "shift": index.shift, "length": 50}
        with pytest.raises((TypeError, ValueError), match=says):
            KeyIndex(**{**parts, "dtype": torch.float32, **change})
    for length in (-1, 4000):  # written by hand
        index.length = length
        with pytest.raises(ValueError, match="key_index must know 0 … 64 keys"):
            index.append(key)
        with pytest.raises(ValueError, match="key_index must know 0 … 64 keys"):
            sparse_attn.topk_select(query, key, 5, key_index=index)
    index.length = 50
    for call, error, says in (
        (lambda: KeyIndex.of(key, capacity=-1), ValueError, "capacity must be at least 0, got -1"),
        (lambda: KeyIndex.of(key, capacity=2.0), TypeError, "capacity must be an int"),
        (lambda: KeyIndex.of(key.long()), TypeError, "key must be float32, float16"),
        (lambda: KeyIndex.of(key.to_sparse()), TypeError, "key must be a dense"),
        (lambda: index.reorder([0, 1]), TypeError, "beam_idx must be an int64"),
        (lambda: index.reorder(torch.tensor([[0], [1]])), ValueError, r"beam_idx must have shape \[B\]"),
        (lambda: index.reorder(torch.tensor([-1, 0])), IndexError, "sequences 0 … 1, got -1"),
        (lambda: index.append(None), TypeError, "key must be a tensor of shape"),
        (lambda: index.append(key[0]), ValueError, "key must have 4 dimensions"),
        (lambda: index.crop(True), TypeError, "length must be an int, got True"),
        (lambda: index.crop(-51), ValueError, "length must be at least -50, got -51"),
    ):
        with pytest.raises(error, match=says):
            call()
    assert index.length == 50  # a refused call changed nothing
    out = sparse_attn.topk_attention(query, key, value, 5, key_index=index)
    assert torch.equal(out, sparse_attn.topk_attention(query, key, value, 5))


def test_a_vmap_over_other_keys_is_refused():
    """One index for several keys would choose wrongly, without a word."""
    query, key, value = (normal(2, h, t, 16, seed=s) for s, (h, t) in enumerate(((4, 1), (2, 300), (2, 300))))
    index = sparse_attn.KeyIndex.of(key)
    keys = torch.stack([key, key + 1])
    with pytest.raises(ValueError, match="key_index is of the same keys in all entries of a vmap"):
        torch.func.vmap(lambda k: sparse_attn.topk_attention(query, k, value, 8, key_index=index))(keys)
    found = torch.func.vmap(lambda q: sparse_attn.topk_attention(q, key, value, 8, key_index=index))(
        query[None]
    )
    assert torch.equal(found[0], sparse_attn.topk_attention(query, key, value, 8))
