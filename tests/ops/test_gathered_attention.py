"""gathered_attention against the oracle: any indices, any groups, garbage included, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracle
from helpers.compare import assert_close
from helpers.inputs import INT32, index_rows, normal, qkv
from helpers.wings import HALF_DTYPES


def run_with_gradients(wing, inputs, indices, scale=None):
    """(out, lse, dquery, dkey, dvalue) of the wing, with both outputs in the loss, and the oracle's five."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = wing.gathered_attention(*leaves, indices, scale=scale, return_lse=True)
    grad_out = normal(*out.shape, dtype=out.dtype, seed=50)
    grad_lse = normal(*lse.shape, seed=51)
    alive = lse.detach() > -math.inf
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse.where(alive, 0.0)))
    exact = oracle.gathered_attention(*(t.double() for t in inputs), indices, scale)
    exact_grads = oracle.gradients(*inputs, indices, grad_out, grad_lse, scale)
    return (out, lse, *grads), (*exact, *exact_grads)


def check(wing, inputs, indices, scale=None):
    ours, exact = run_with_gradients(wing, inputs, indices, scale)
    names = ("out", "lse", "grad of query", "grad of key", "grad of value")
    assert ours[0].dtype == inputs[0].dtype
    assert ours[1].dtype == torch.float32
    for name, mine, true in zip(names, ours, exact, strict=True):
        # The backward may use the rounded `out` of a half type, which is a second rounding.
        half_gradient = name.startswith("grad") and mine.dtype in HALF_DTYPES
        assert_close(mine, true, name, units=2 if half_gradient else 4 if name == "lse" else None)


@pytest.mark.parametrize("groups", ["one", "per key head", "per query head", "no axis"])
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_groups(wing, dtype, groups, garbage, heads, kv_heads):
    inputs = qkv(2, heads, kv_heads, 9, 21, 12, 10, dtype=dtype)
    count = {"one": 1, "per key head": kv_heads, "per query head": heads, "no axis": 1}[groups]
    indices = index_rows((2, count, 9, 7), 21, garbage=garbage)
    check(wing, inputs, indices[:, 0] if groups == "no axis" else indices)


SHAPES = [  # (B, Hq, Hkv, Tq, Tk, D, Dv, K)
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 40, 2, 3, 5),
    (2, 2, 2, 33, 17, 7, 72, 17),
    (1, 1, 1, 5, 3, 72, 7, 30),
    (1, 2, 2, 15, 31, 256, 1, 16),
    (1, 2, 1, 16, 63, 1, 256, 15),
    (1, 1, 1, 31, 65, 64, 64, 64),
    (3, 1, 1, 2, 127, 33, 65, 63),
    (1, 4, 2, 65, 257, 16, 24, 33),
    (1, 2, 2, 130, 130, 80, 96, 40),
    (1, 1, 1, 4, 1000, 24, 16, 600),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(wing, dtype, shape):
    batch, heads, kv_heads, queries, keys, dim, value_dim, width = shape
    inputs = qkv(batch, heads, kv_heads, queries, keys, dim, value_dim, dtype=dtype)
    check(wing, inputs, index_rows((batch, heads, queries, width), keys))
    check(wing, inputs, index_rows((batch, kv_heads, queries, width), keys, garbage=True))


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0, 1e-4])
def test_scales(wing, dtype, scale):
    check(wing, qkv(1, 2, 1, 8, 30, 16, dtype=dtype), index_rows((1, 2, 8, 9), 30), scale)


def test_index_given_twice_counts_twice(wing):
    query, key, value = qkv(1, 1, 1, 1, 3, 4)
    out = wing.gathered_attention(query, key, value, torch.tensor([[[[2, 0, 2, 2]]]], dtype=torch.int32))
    weights = (query[0, 0] @ key[0, 0].T / 2).exp() * torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(out[0, 0], weights / weights.sum() @ value[0, 0])


def test_order_of_the_indices_does_not_matter(wing):
    inputs = qkv(1, 2, 2, 6, 40, 8)
    indices = index_rows((1, 2, 6, 40), 40)
    shuffled = indices[..., torch.randperm(40)]
    torch.testing.assert_close(
        wing.gathered_attention(*inputs, indices), wing.gathered_attention(*inputs, shuffled)
    )


@pytest.mark.parametrize(
    "bad", [-1, -2, 21, 22, 1 << 20, INT32.min, INT32.max, 1 << 31, (1 << 32) + 3, -(1 << 32), 1 << 62]
)
def test_index_out_of_range_is_an_empty_slot(wing, dtype, bad):
    """Also the 64-bit ones whose lower half would lie in range."""
    inputs = qkv(1, 2, 1, 5, 21, 8, dtype=dtype)
    indices = index_rows((1, 2, 5, 6), 21).long()
    dirty = indices.where(indices >= 0, bad)
    dirty[0, 0, 0] = bad
    clean = indices.clone()
    clean[0, 0, 0] = -1
    if INT32.min <= bad <= INT32.max:
        dirty = dirty.int()
    expected = wing.gathered_attention(*inputs, clean, return_lse=True)
    for ours, want in zip(wing.gathered_attention(*inputs, dirty, return_lse=True), expected, strict=True):
        assert torch.equal(ours, want)
    check(wing, inputs, dirty)


def test_int64_indices_are_int32_ones(wing, dtype):
    inputs = qkv(1, 2, 2, 7, 21, 8, dtype=dtype)
    indices = index_rows((1, 2, 7, 6), 21)
    assert torch.equal(
        wing.gathered_attention(*inputs, indices.long()), wing.gathered_attention(*inputs, indices)
    )


def strided_indices() -> dict[str, torch.Tensor]:
    """[2, 4, 9, 6] in every layout that a caller may bring."""
    shape = (2, 4, 9, 6)
    every_second = torch.full((2, 4, 9, 12), INT32.max, dtype=torch.int32)[..., ::2]
    inside = torch.full((4, 6, 11, 9), INT32.max, dtype=torch.int32)[1:-1, 1:-1, 1:-1, 2:-1]
    return {
        "transposed": index_rows((2, 4, 6, 9), 21, garbage=True).mT,
        "time_first": index_rows((2, 9, 4, 6), 21, garbage=True).transpose(1, 2),
        "every_second": every_second.copy_(index_rows(shape, 21)),
        "inside": inside.copy_(index_rows(shape, 21)),
        "one_row_for_all": index_rows((1, 1, 1, 6), 21).expand(shape),
        "one_head_for_all": index_rows((2, 1, 9, 6), 21).expand(shape),
        "one_key_for_all": index_rows((2, 4, 9, 1), 21, garbage=True).expand(shape),
    }


@pytest.mark.parametrize("layout", strided_indices())
def test_index_strides(wing, layout):
    check(wing, qkv(2, 4, 2, 9, 21, 8), strided_indices()[layout])


def test_lse_is_the_log_of_the_sum_of_exponentials(wing):
    query, key, value = qkv(1, 1, 1, 3, 10, 4)
    _, lse = wing.gathered_attention(
        query, key, value, torch.arange(10).expand(1, 1, 3, 10), scale=0.5, return_lse=True
    )
    torch.testing.assert_close(lse, (query @ key.mT * 0.5).logsumexp(-1))
    merged = [  # two halves of the keys, merged by their LSE, are the whole
        wing.gathered_attention(query, key, value, part.expand(1, 1, 3, 5), scale=0.5, return_lse=True)
        for part in torch.arange(10).split(5)
    ]
    weights = torch.stack([part_lse for _, part_lse in merged]).softmax(0).unsqueeze(-1)
    whole = wing.gathered_attention(query, key, value, torch.arange(10).expand(1, 1, 3, 10), scale=0.5)
    torch.testing.assert_close((weights * torch.stack([out for out, _ in merged])).sum(0), whole)
