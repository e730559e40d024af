"""Properties over generated shapes, options and inputs (hypothesis), against the oracle."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_best, assert_identical
from helpers.inputs import LAYOUTS, index_rows, integers, mask, normal, qkv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = [pytest.mark.slow, pytest.mark.dtypes(torch.float32, torch.bfloat16, torch.float16)]


@st.composite
def shapes(draw, value_dim: bool = False):
    """(B, Hq, Hkv, Tq, Tk, D, Dv)."""
    kv_heads = draw(st.integers(1, 3))
    return (
        draw(st.integers(1, 2)),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 90)),
        draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 64, 72])),
        draw(st.sampled_from([1, 4, 7, 16, 31, 64])) if value_dim else 1,
    )


@st.composite
def selections(draw, shape):
    """(top_k, options) that are valid for the shape, sharing left out."""
    batch, heads, _, queries, keys, *_ = shape
    top_k = draw(st.integers(1, keys + 5))
    options = {"scale": draw(st.sampled_from([None, 1.0, 0.25, 0.0, -1.5]))}
    if draw(st.booleans()):
        options["is_causal"] = True
        options["causal_offset"] = draw(st.integers(-queries - 2, keys + 2))
        options["window"] = draw(st.integers(0, top_k))
    options["sinks"] = draw(st.integers(0, top_k - options.get("window", 0)))
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from([1, full])) for full in (batch, queries, keys)]
        heads_of_mask = 1  # heads that share must see the same
        options["attn_mask"] = mask(sizes[0], heads_of_mask, *sizes[1:], seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
        options["key_lengths"] = torch.tensor(
            lengths, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        )
    return top_k, options


layouts = st.sampled_from(list(LAYOUTS.values()))


@given(data=st.data())
@bounded
def test_selection_of_exact_scores(wing, dtype, data):
    shape = data.draw(shapes())
    top_k, options = data.draw(selections(shape))
    seed, largest = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0, 1, 3, 9]))
    query, key, _ = qkv(
        *shape, dtype=dtype, seed=seed, make=lambda *s, **kw: integers(*s, largest=largest, **kw)
    )
    query, key = data.draw(layouts)(query), data.draw(layouts)(key)
    assert_identical(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


@given(data=st.data())
@bounded
def test_selection_of_normal_scores(wing, dtype, data):
    shape = data.draw(shapes())
    top_k, options = data.draw(selections(shape))
    options["share"] = data.draw(st.sampled_from(["none", "kv", "all"]))
    query, key, _ = qkv(*shape, dtype=dtype, seed=data.draw(st.integers(0, 999)))
    assert_best(wing.topk_select(query, key, top_k, **options), query, key, top_k, **options)


@given(data=st.data())
@bounded
def test_attention_and_its_gradients(wing, dtype, data):
    shape = data.draw(shapes(value_dim=True))
    top_k, options = data.draw(selections(shape))
    options["share"] = data.draw(st.sampled_from(["none", "kv", "all"]))
    inputs = [data.draw(layouts)(t).requires_grad_() for t in qkv(*shape, dtype=dtype)]
    out, lse, indices = wing.topk_attention(*inputs, top_k, return_lse=True, return_indices=True, **options)
    check_attention(inputs, indices, out, lse, options["scale"])


@given(data=st.data())
@bounded
def test_attention_to_any_indices(wing, dtype, data):
    shape = data.draw(shapes(value_dim=True))
    batch, heads, kv_heads, queries, keys, *_ = shape
    groups = data.draw(st.sampled_from([1, kv_heads, heads]))
    width = data.draw(st.integers(0, 70))
    seed = data.draw(st.integers(0, 999))
    indices = index_rows((batch, groups, queries, width), keys, seed, garbage=data.draw(st.booleans()))
    scale = data.draw(st.sampled_from([None, 1.0, -0.5, 0.0]))
    inputs = [data.draw(layouts)(t).requires_grad_() for t in qkv(*shape, dtype=dtype)]
    out, lse = wing.gathered_attention(*inputs, indices, scale=scale, return_lse=True)
    check_attention(inputs, indices, out, lse, scale)


def check_attention(inputs, indices, out, lse, scale):
    """Within the errors of float32 arithmetic on terms of these sizes, and one or two roundings to the dtype.

    `spread` is the largest Σ|q·k|: a score, a sum of D products, is off by about √D of its roundings, and a
    probability by that factor.
    """
    query, key, value = (t.detach() for t in inputs)
    factor = abs(query.shape[3] ** -0.5 if scale is None else scale)
    spread = oracle.scores(query.abs(), key.abs(), factor).max()
    float32 = torch.finfo(torch.float32).eps * (8 + spread * (2 + query.shape[3] ** 0.5) / 2)
    rounding = torch.finfo(out.dtype).eps

    def check(name, ours, true, size, roundings):
        error = (ours.detach().double() - true).abs().nan_to_num(0.0).max()  # −inf − −inf is no error
        allowed = float32 * size + roundings * size
        assert torch.equal(ours.isneginf(), true.isneginf()), name
        assert error <= allowed, f"{name}: error {error:.3g} is more than {allowed:.3g}"

    want, want_lse = oracle.gathered_attention(query, key, value, indices, scale)
    check("out", out, want, value.abs().max().double(), rounding)
    check("lse", lse, want_lse, 1.0, 0.0)
    grad = normal(*out.shape, dtype=out.dtype, seed=1)
    grad_lse = normal(*lse.shape, seed=2).where(lse.detach() > -torch.inf, 0.0)
    ours = torch.autograd.grad((out, lse), inputs, (grad, grad_lse))
    exact = oracle.gradients(*inputs, indices, grad, grad_lse, scale)
    largest = grad.abs().double().sum(-1).max() * value.abs().max() + grad_lse.abs().max()
    # A key's gradients are sums over the queries that attend to it, in all as much as its attention mass.
    mass = oracle.gradients(query, key, value, indices, torch.ones_like(grad), scale=scale)[2].max()
    largest *= factor
    sizes = (largest * key.abs().max(), largest * query.abs().max() * mass, grad.abs().max() * mass)
    for tensor, mine, true, size in zip(("query", "key", "value"), ours, exact, sizes, strict=True):
        check(f"gradient of {tensor}", mine, true, size.double(), 2 * rounding)


@given(data=st.data())
@bounded
def test_more_budget_keeps_what_less_budget_kept(wing, dtype, data):
    shape = data.draw(shapes())
    top_k, options = data.draw(selections(shape))
    query, key, _ = qkv(*shape, dtype=dtype, make=integers, seed=data.draw(st.integers(0, 999)))
    small = wing.topk_select(query, key, top_k, **options)
    large = wing.topk_select(query, key, top_k + data.draw(st.integers(1, 9)), **options)
    kept = (small.unsqueeze(-1) == large.unsqueeze(-2)).any(-1)
    assert bool((kept | (small < 0)).all())
