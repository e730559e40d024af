"""gathered_attention in Triton, interpreted: every way through its kernels, at shapes that take no time.

`check` (of the ordinary tests) holds out, LSE and the three gradients against the oracle in float64. The interpreter
is slow: of independent parameters every pair of values is taken, not every combination.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.compare import assert_close
from helpers.inputs import LAYOUTS, index_rows, normal, qkv
from helpers.pairwise import pairwise
from ops import test_gathered_attention_special as special
from ops.test_gathered_attention import check
from ops.test_gathered_attention_special import (  # noqa: F401
    test_a_gradient_of_strides_zero,
    test_a_gradient_that_begins_anywhere,
    test_large_scores,
    test_nan,
    test_nothing,
    test_rows_of_minus_infinity,
)
from ops.test_torch_integration import op_arguments, overload

import sparse_attn
from sparse_attn.ops.gathered_attention import uses_atomics
from sparse_attn.triton_kernels import gathered_attention, gathered_attention_backward
from sparse_attn.triton_kernels.lib import common


@pytest.mark.parametrize("groups", ["one", "per key head", "per query head"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (9, 1)])
def test_groups(wing, groups, heads, kv_heads):
    """Alone and in tiles of heads, with the same keys and with others for each key head; each dtype thrice."""
    names = {"one": 1, "per key head": kv_heads, "per query head": heads}
    dtype = wing.dtypes[(list(names).index(groups) + heads) % 3]
    inputs = qkv(1, heads, kv_heads, 2, 11, 16, dtype=dtype)
    check(wing, inputs, index_rows((1, names[groups], 2, 7), 11, garbage=True))


@pytest.mark.parametrize(("shared", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (8, torch.bfloat16)])
def test_empty_slots_do_not_leak(wing, shared, dtype):
    """Of NaN alone: 0 · inf is NaN, too."""
    special.test_empty_slots_do_not_leak(wing, dtype, shared, math.nan)


TYPES = (torch.float32, torch.bfloat16)  # float16 differs in its conversions alone: the groups have it


@pairwise(dims=[(1, 3), (64, 64), (72, 24), (20, 72), (256, 40)], shared=[1, 5], dtype=TYPES)
def test_head_dimensions(wing, dtype, dims, shared):
    check(wing, qkv(1, shared, 1, 2, 9, *dims, dtype=dtype), index_rows((1, 1, 2, 5), 9))


@pairwise(budget=[0, 1, 16, 70, 131], shared=[1, 4], dtype=TYPES)
def test_budgets(wing, dtype, budget, shared):
    """None, one, a block and several, the last one not full."""
    check(
        wing,
        qkv(1, shared, 1, 2, 90, 16, dtype=dtype),
        index_rows((1, 1, 2, budget), 90, garbage=budget > 90),
    )


@pytest.mark.parametrize("shared", [16, 40, 70])
def test_many_heads(wing, shared):
    """One tile, and several: the gradient of a key is the sum over them."""
    check(wing, qkv(1, shared, 1, 2, 9, 16, dtype=torch.bfloat16), index_rows((1, 1, 2, 5), 9))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [1, 4])
def test_layouts(wing, layout, shared):
    inputs = [LAYOUTS[layout](t) for t in qkv(2, 2 * shared, 2, 2, 7, 16, 8, dtype=torch.bfloat16)]
    check(wing, inputs, index_rows((2, 2, 5, 2), 7, garbage=True).mT)


@pytest.mark.parametrize(
    ("limit", "size", "shared", "dtype"),
    [
        ("LISTED_ENTRIES", 1, 1, torch.bfloat16),
        ("LISTED_ENTRIES", 24, 1, torch.float32),
        ("LISTED_ENTRIES", 24, 4, torch.bfloat16),
        ("SCRATCH_BYTES", 3000, 4, torch.bfloat16),
    ],
)
def test_chunks_of_queries(wing, limit, size, shared, dtype, monkeypatch):
    """One query per chunk, and two with one left over: dK and dV gather over the chunks in float32."""
    inputs, indices = qkv(1, 2 * shared, 2, 3, 9, 16, dtype=dtype), index_rows((1, 2, 3, 6), 9)
    monkeypatch.setattr(gathered_attention_backward, limit, size)
    check(wing, inputs, indices)


def test_chunks_are_of_one_size():
    chunk_of = gathered_attention_backward.chunk_of
    assert [chunk_of(10, n) for n in (0, 1, 3, 9, 10, 11)] == [1, 1, 3, 5, 10, 10]


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.torch_defaults
@pytest.mark.parametrize("shared", [1, 4])
def test_atomics(wing, dtype, shared, monkeypatch):
    """Asked for by the environment, and not in torch's deterministic mode."""
    monkeypatch.setenv("SPARSE_ATTN_ATOMICS", "1")
    assert uses_atomics()
    check(wing, qkv(2, 2 * shared, 2, 3, 9, 16, dtype=dtype), index_rows((2, 2, 3, 6), 9, garbage=True))
    torch.use_deterministic_algorithms(True)
    assert not uses_atomics()


def test_a_grid_of_three_axes(wing, monkeypatch):
    """More sets of heads than the second axis of a grid takes."""
    monkeypatch.setattr(common, "_SECOND_AXIS", 2)
    assert common.grid_of(7, 5) == (7, 2, 3)
    check(wing, qkv(1, 5, 5, 2, 7, 8), index_rows((1, 1, 2, 4), 7))
    check(wing, qkv(1, 12, 3, 2, 7, 8, dtype=torch.float16), index_rows((1, 1, 2, 4), 7))


def test_only_the_gradient_of_the_lse(wing, dtype):
    inputs, indices = qkv(1, 4, 1, 3, 9, 16, dtype=dtype), index_rows((1, 1, 3, 5), 9)
    leaves = [t.requires_grad_() for t in inputs]
    grad = normal(1, 4, 3, seed=4)

    def gradients(backend):
        _, lse = sparse_attn.gathered_attention(*leaves, indices, return_lse=True, backend=backend)
        grads = torch.autograd.grad(lse, leaves[:2], grad.where(lse.detach() > -math.inf, 0.0))
        return zip(("grad of query", "grad of key"), grads, strict=True)

    for (name, ours), (_, want) in zip(gradients("triton"), gradients("reference"), strict=True):
        assert_close(ours, want, name, units=2 if dtype != torch.float32 else None)


@pytest.mark.parametrize(
    ("op", "variant"), [("gathered_attention", "options"), ("gathered_attention_backward", "shared")]
)
def test_opcheck(wing, op, variant):
    """What the kernels may break; how autograd reaches them is the same declaration for every wing."""
    dtype = torch.bfloat16 if variant == "shared" else torch.float32
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload(op, wing), op_arguments(wing, dtype, op, variant), test_utils=tests)


def test_compile(wing):
    torch._dynamo.reset()

    def attend(query, key, value, indices):
        return sparse_attn.gathered_attention(query * 2, key, value, indices, backend="triton").relu()

    inputs, indices = qkv(1, 4, 2, 3, 9, 8), index_rows((1, 2, 3, 4), 9)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for function in (compiled, attend):
        leaves = [t.clone().requires_grad_() for t in inputs]
        function(*leaves, indices).sum().backward()
        if function is compiled:
            want = leaves
    assert all(torch.equal(mine.grad, true.grad) for mine, true in zip(leaves, want, strict=True))


def test_configurations_fit(wing):
    """Block sizes are powers of two and hold the heads, whatever the shape."""
    for shared in (1, 2, 3, 16, 33, 128):
        for dim in (1, 64, 72, 128, 256):
            for dtype in wing.dtypes:
                forward = gathered_attention.tile_configs(dtype, shared, dim, 1)
                backward = gathered_attention_backward.tile_configs(shared, 1, dim)
                for config in (*forward, *backward, *gathered_attention.vector_configs(dim, 8, 2048)):
                    assert all(size & (size - 1) == 0 for n, size in config.items() if n.startswith("BLOCK"))
