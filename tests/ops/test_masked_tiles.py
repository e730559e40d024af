"""Attention by dense tiles: the indices of gathering, to the bit; outputs, LSE and gradients within rounding."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import OPTIONS, index_rows, integers, normal, options_for

import sparse_attn
from sparse_attn.ops import topk_attention
from sparse_attn.wings import extension, tile_costs
from sparse_attn.wings.cpu import attention_by_tiles

native = extension.module
pytestmark = pytest.mark.skipif(native is None, reason=str(extension.load_error))


def both_ways(call):
    with attention_by_tiles(False):
        gathered = call()
    with attention_by_tiles(True):
        tiled = call()
    return gathered, tiled


def close(gathered, tiled, dtype=torch.float32) -> None:
    """Two roundings of one sum: a few units of the dtype, of float32 at least, of the largest number.

    Scores of up to 30 are off by 2⁻¹⁹ themselves, and go into an exponent.
    """
    unit = 8 * {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 2.0**-21)
    largest = max(1.0, gathered.nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    torch.testing.assert_close(tiled, gathered, rtol=unit, atol=unit * largest, equal_nan=True)


def trained(query, key, value, top_k, seed=0, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    out, lse, indices = sparse_attn.topk_attention(
        *leaves, top_k, return_lse=True, return_indices=True, backend="cpu", **options
    )
    weight = normal(*out.shape, dtype=out.dtype, seed=seed + 7)
    # The LSE of a row without keys is −inf: it takes no part.
    loss = (out * weight).float().sum() + (lse.where(lse.isfinite(), 0.0) * weight[..., 0].float()).sum()
    loss.backward()
    return out.detach(), lse.detach(), indices, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_rules(name, dtype):
    for number, (heads, length, dim, value_dim, top_k) in enumerate(
        [((2, 2), 150, 64, 64, 40), ((4, 2), 131, 40, 24, 9), ((3, 1), 97, 7, 17, 90)]
    ):
        query, key = (normal(2, h, length, dim, dtype=dtype, seed=i) for i, h in enumerate(heads))
        value = normal(2, heads[1], length, value_dim, dtype=dtype, seed=5)
        options = options_for(name, query, key, seed=number)
        gathered, tiled = both_ways(
            lambda q=query, k=key, v=value, n=top_k, o=options: trained(q, k, v, n, **o)
        )
        assert torch.equal(gathered[2], tiled[2])
        for one, other in zip(gathered[:2] + gathered[3:], tiled[:2] + tiled[3:], strict=True):
            close(one, other, dtype)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_without_indices_has_the_same_bits(name, tiles, monkeypatch):
    monkeypatch.setattr(topk_attention, "FEW_KEPT", 1)
    query, key, value = (normal(2, h, 150, 40, seed=h) for h in (4, 2, 2))
    options = options_for(name, query, key)
    call = lambda **more: sparse_attn.topk_attention(  # noqa: E731
        query, key, value, 30, return_lse=True, backend="cpu", **options, **more
    )
    with attention_by_tiles(tiles):
        for alone, beside in zip(call(), call(return_indices=True), strict=False):
            torch.testing.assert_close(alone, beside, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_by_bits_is_that_by_indices(name, dtype, monkeypatch):
    """Where nobody asks for the indices the selection is kept as bits: the same numbers in less memory."""
    monkeypatch.setattr(topk_attention, "FEW_KEPT", 1)
    query, key, value = (normal(2, h, 150, 40, seed=h, dtype=dtype) for h in (4, 2, 2))
    options = options_for(name, query, key)
    sinks = normal(4).requires_grad_()
    found, kept = [], []
    for return_indices in (True, False):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        saved = []
        with (
            attention_by_tiles(True),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t),
        ):
            out, lse, *_ = sparse_attn.topk_attention(
                *leaves, 90, return_lse=True, return_indices=return_indices, backend="cpu",
                **{"sink_logits": sinks, **options},
            )  # fmt: skip
            weight = normal(*out.shape, seed=7)
            loss = (out * weight).float().sum() + lse.where(lse.isfinite(), 0.0).square().sum()
            found.append((out, lse, *torch.autograd.grad(loss, (*leaves, sinks), allow_unused=True)))
        kept.append(sum(t.nbytes for t in saved if t.dtype == torch.int32 and t.dim() == 4))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    by_bits = not {"attn_mask", "share"} & options.keys() and not torch.is_tensor(
        options.get("causal_offset")
    )
    assert (kept[1] < kept[0]) == by_bits


def test_derivatives_that_bits_cannot_give_go_by_indices(monkeypatch):
    monkeypatch.setattr(topk_attention, "FEW_KEPT", 1)
    query, key, value = (normal(1, 2, 80, 16, seed=i) for i in range(3))
    attend = lambda q: sparse_attn.topk_attention(q, key, value, 50, is_causal=True, backend="cpu")  # noqa: E731
    with attention_by_tiles(True):
        leaf = query.clone().requires_grad_()
        (plain,) = torch.autograd.grad(attend(leaf).sum(), leaf)
        torch.testing.assert_close(torch.func.grad(lambda q: attend(q).sum())(query), plain)
        _, along = torch.func.jvp(attend, (query,), (torch.ones_like(query),))
        torch.testing.assert_close(along.sum(), plain.sum())
        (first,) = torch.autograd.grad(attend(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="first-order"):
            first.sum().backward()


def test_backward_goes_the_way_that_is_cheaper_for_all_rows_together():
    # Tiles would be the cheaper way for the rows around the 300th alone.
    inputs = [normal(1, 1, 1024, 64, seed=i) for i in range(3)]
    default = trained(*inputs, 64, is_causal=True)
    with attention_by_tiles(False):
        gathered = trained(*inputs, 64, is_causal=True)
    for one, other in zip(default, gathered, strict=True):
        assert torch.equal(one, other)


def test_rows_that_see_few_keys_need_no_long_indices():
    query, key, value = (normal(1, 2, 1100, 64, seed=i) for i in range(3))
    rows = torch.arange(1100)[None]
    for top_k in (600, 2000):
        for options in ({}, {"key_starts": (rows > 400) * 400}, {"attn_mask": rows < 900}):
            call = lambda k=top_k, o=options, **more: sparse_attn.topk_attention(  # noqa: E731
                query, key, value, k, is_causal=True, backend="cpu", return_lse=True, **o, **more
            )
            for alone, beside in zip(call(), call(return_indices=True), strict=False):
                assert torch.equal(alone, beside)


@pytest.mark.parametrize("top_k", [1, 2, 30, 64, 65, 200, 299, 300, 400])
@pytest.mark.parametrize("make", [normal, integers])
def test_budgets_and_ties(make, top_k):
    query, key, value = (make(1, 2, 300, 8, seed=i) for i in range(3))
    for options in ({"is_causal": True}, {}, {"attn_mask": torch.rand(300, 300) < 0.5}, {"scale": -0.4}):
        gathered, tiled = both_ways(
            lambda o=options: sparse_attn.topk_attention(
                query, key, value, top_k, return_lse=True, return_indices=True, backend="cpu", **o
            )
        )
        assert torch.equal(gathered[2], tiled[2])
        close(gathered[0], tiled[0])
        close(gathered[1], tiled[1])


@pytest.mark.parametrize("kind", ["constant", "two", "heavy", "ascending", "zeros", "huge"])
def test_thresholds_of_odd_rows(kind):
    """Scores of any distribution: the K-th best is found by counting from a guess."""
    length = 700
    scores = {
        "constant": torch.ones(length),
        "two": (torch.arange(length) % 3 == 0).float(),
        "heavy": torch.distributions.Cauchy(0.0, 1.0).sample((length,)),
        "ascending": torch.arange(length).float(),
        "zeros": torch.zeros(length) * torch.where(torch.arange(length) % 2 == 0, 1.0, -1.0),
        "huge": torch.randn(length) * 1e30,
    }[kind]
    query = torch.ones(1, 1, 40, 1)
    key = scores.view(1, 1, length, 1)
    value = normal(1, 1, length, 16)
    for top_k in (1, 63, 64, 65, 350, 699):
        gathered, tiled = both_ways(
            lambda n=top_k: sparse_attn.topk_attention(
                query, key, value, n, return_lse=True, return_indices=True, backend="cpu"
            )
        )
        assert torch.equal(gathered[2], tiled[2])
        close(gathered[0], tiled[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_special_values_stay_where_they_are_seen(where, bad):
    tensors = dict(
        zip(("query", "key", "value"), (normal(1, 2, 200, 16, seed=i) for i in range(3)), strict=True)
    )
    tensors[where][0, 0, 120, 3] = bad
    gathered, tiled = both_ways(lambda: trained(*tensors.values(), 60, is_causal=True))
    assert torch.equal(gathered[2], tiled[2])
    for name, one, other in zip(
        ("out", "query", "key", "value"), gathered[:1] + gathered[3:], tiled[:1] + tiled[3:], strict=True
    ):
        assert torch.equal(one.isfinite(), other.isfinite()), name
        close(one.where(one.isfinite(), 0.0), other.where(other.isfinite(), 0.0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gathered_attention(groups):
    query, key, value = normal(2, 4, 90, 24), normal(2, 2, 110, 24, seed=1), normal(2, 2, 110, 40, seed=2)
    indices = index_rows((2, groups, 90, 50), 110, seed=3)

    def call():
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        out, lse = sparse_attn.gathered_attention(*leaves, indices, return_lse=True, backend="cpu")
        (out.sin().sum() + lse.where(lse.isfinite(), 0.0).cos().sum()).backward()
        return out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)

    for one, other in zip(*both_ways(call), strict=True):
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [9, 40, 130])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_errors_are_those_of_gathering(dtype, top_k, spread):
    """Against float64: outputs, LSE and gradients are off by no more than a few times what gathering is off by."""
    query, key, value = (normal(1, h, 130, 24, dtype=dtype, seed=h) for h in (4, 2, 2))
    query = query * spread
    indices = sparse_attn.topk_select(query, key, top_k, is_causal=True)
    weight, of_lse = normal(1, 4, 130, 24, seed=11).double(), normal(1, 4, 130, 1, seed=12)[..., 0].double()

    def call(dtype, backend):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (query, key, value)]
        sinks = torch.linspace(-1.0, 1.0, 4, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        out, lse = sparse_attn.gathered_attention(
            *leaves, indices, sink_logits=sinks, softcap=6.0, return_lse=True, backend=backend
        )
        ((out.double() * weight).sum() + (lse.double() * of_lse).sum()).backward()
        return out.detach(), lse.detach(), *(leaf.grad for leaf in (*leaves, sinks))

    exact = call(torch.float64, "reference")
    for right, gathered, tiled in zip(exact, *both_ways(lambda: call(dtype, "cpu")), strict=True):
        largest = right.abs().max()
        error, allowed = ((t.double() - right).abs().max() for t in (tiled, gathered))
        assert error <= 3 * allowed + 2.0**-21 * largest, (error / largest, allowed / largest)


def test_keys_that_are_named_twice_count_twice():
    query, key, value = (normal(1, 2, 64, 16, seed=i) for i in range(3))
    indices = index_rows((1, 2, 64, 30), 64, garbage=True)
    for one, other in zip(*both_ways(lambda: sparse_attn.gathered_attention(
        query, key, value, indices, return_lse=True, backend="cpu"
    )), strict=True):  # fmt: skip
        close(one, other)


def test_the_whole_against_float64():
    query, key, value = (normal(1, 4, 400, 32, seed=i) for i in range(3))
    with attention_by_tiles(True):
        out, lse, indices = sparse_attn.topk_attention(
            query, key, value, 150, is_causal=True, return_lse=True, return_indices=True, backend="cpu"
        )
    exact, exact_lse = oracle.gathered_attention(query, key, value, indices)
    assert_close(out, exact, "out")
    assert_close(lse, exact_lse, "lse")


def test_threads_and_packing_change_no_bit():
    query, key, value = (normal(1, 4, 700, 32, seed=i) for i in range(3))
    lengths = torch.tensor([300, 130, 270])
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).unsqueeze(0)
    before = torch.get_num_threads()
    with attention_by_tiles(True):
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(trained(query, key, value, 100, is_causal=True, key_starts=starts))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        first = 0
        for length in lengths.tolist():
            part = slice(first, first + length)
            alone = sparse_attn.topk_attention(
                query[:, :, part], key[:, :, part], value[:, :, part], 100, is_causal=True, backend="cpu"
            )
            assert torch.equal(alone, results[0][0][:, :, part])
            first += length


def test_explain_says_which_way():
    query = normal(1, 2, 1024, 32)
    assert "masked tiles" in str(sparse_attn.explain(query, query, query, 1024, backend="cpu"))
    assert "gathered" in str(sparse_attn.explain(query, query, query, 2, backend="cpu"))


def test_costs_in_a_file(tmp_path, monkeypatch):
    before = native.tile_costs()
    file = tmp_path / "costs.json"
    monkeypatch.setenv(tile_costs.VARIABLE, str(file))
    try:
        tile_costs.load(native)  # no file: nothing happens
        assert native.tile_costs() == before
        tile_costs.write(before | {"tile": 0.5})
        tile_costs.load(native)
        assert native.tile_costs() == before | {"tile": 0.5}
        for text in ("", "[]", "{", json.dumps(before | {"tile": -1}), json.dumps({"tile": 1}), "[" * 5000):
            file.write_text(text)
            with pytest.warns(UserWarning, match="costs that it came with"):
                tile_costs.load(native)
        assert native.tile_costs() == before | {"tile": 0.5}
    finally:
        native.set_tile_costs(**before)
