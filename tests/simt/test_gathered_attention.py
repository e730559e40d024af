"""gathered_attention of csrc/cuda on the simulated GPU: the tests of the op, and each way through its kernels.

The simulation is slow: of independent parameters every pair of values is taken, not every combination.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from helpers.inputs import LAYOUTS, index_rows, qkv
from helpers.pairwise import pairwise
from ops import test_gathered_attention as of_the_op
from ops.test_gathered_attention import (  # noqa: F401
    SHAPES,
    check,
    run_with_gradients,
    test_index_given_twice_counts_twice,
    test_scales,
)
from ops.test_gathered_attention_special import (  # noqa: F401
    test_a_gradient_of_strides_zero,
    test_a_gradient_that_begins_anywhere,
    test_empty_slots_do_not_leak,
    test_large_scores,
    test_nan,
    test_nothing,
    test_rows_of_minus_infinity,
)

from simt import device
from simt.device import SCHEDULES
from simt.params import AttendParams
from simt.wing import SimulatedWing

pytestmark = pytest.mark.slow
WINGS = [SimulatedWing()]
DTYPES = WINGS[0].dtypes
TYPES = (torch.float32, torch.bfloat16)


@pairwise(
    heads=[(6, 2), (3, 3), (4, 1)],
    groups=["one", "per key head", "per query head", "no axis"],
    garbage=[False, True],
    dtype=DTYPES,
)
def test_groups(wing, dtype, groups, garbage, heads):
    of_the_op.test_groups(wing, dtype, groups, garbage, *heads)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)], ids=str
)
def test_shapes(wing, dtype, shape):
    """One dtype each: which sizes meet which dtype, the head dimensions below and the groups say."""
    of_the_op.test_shapes(wing, dtype, shape)


@pairwise(
    dims=[(1, 3), (64, 64), (72, 24), (20, 72), (128, 128), (256, 40), (8, 256)],
    shared=[1, 5, 9, 16],
    dtype=TYPES,
)
def test_head_dimensions(wing, dtype, dims, shared):
    check(wing, qkv(1, shared, 1, 2, 9, *dims, dtype=dtype), index_rows((1, 1, 2, 5), 9))


@pairwise(budget=[0, 1, 31, 64, 131], shared=[1, 3, 8], dtype=TYPES)
def test_budgets(wing, dtype, budget, shared):
    inputs = qkv(1, shared, 1, 2, 90, 16, dtype=dtype)
    check(wing, inputs, index_rows((1, 1, 2, budget), 90, garbage=budget > 90))


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("dim", [16, 200])
@pytest.mark.parametrize("shared", [17, 33, 70])
def test_many_heads(wing, dtype, shared, dim):
    """Two and four warps of heads, more heads than a block has, and keys divided between warps."""
    check(wing, qkv(1, shared, 1, 1, 90, dim, dtype=dtype), index_rows((1, 1, 1, 70), 90))


@pytest.mark.dtypes(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("way", [{"atomics": True}, {"chunk": 2}], ids=str)
@pytest.mark.parametrize(("shared", "dims"), [(9, (24, 72)), (70, (16, 16))])
def test_gradients_on_tensor_cores(wing, dtype, shared, dims, way):
    """Added up with atomics, and in chunks of queries whose last one is shorter."""
    other = SimulatedWing(**way)
    check(
        other, qkv(2, 2 * shared, 2, 5, 40, *dims, dtype=dtype), index_rows((2, 2, 5, 37), 40, garbage=True)
    )
    check(other, qkv(1, 2 * shared, 2, 3, 9, *dims, dtype=dtype), index_rows((1, 1, 3, 4), 9))


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shared", [1, 9])
@pytest.mark.parametrize("key_range", [1, 17, 39])
def test_keys_are_counted_in_ranges(wing, dtype, shared, key_range):
    """As where the counts of all keys would take too much memory: the same bits."""
    inputs = qkv(2, 2 * shared, 2, 19, 40, 16, dtype=dtype)
    indices = index_rows((2, 2, 19, 37), 40, garbage=True)
    ranges, whole = (
        run_with_gradients(w, inputs, indices)[0] for w in (SimulatedWing(key_range=key_range), wing)
    )
    assert all(torch.equal(mine, true) for mine, true in zip(ranges, whole, strict=True))


def test_counts_of_keys_take_bounded_memory():
    """Whatever the number of keys: no more than 64 MB, where they took 8 bytes for each key and each of 512 blocks."""
    library = device.library()
    for name in ("run_key_list_blocks", "run_key_list_range"):
        getattr(library, name).restype = ctypes.c_int64
    for selections, length in itertools.product((1, 8, 64), (1, 100, 16384, 1 << 20, 1 << 27)):
        p = AttendParams(batch=1, groups=selections, query_length=length, key_length=length, slots=64)
        blocks = library.run_key_list_blocks(ctypes.byref(p))
        keys = library.run_key_list_range(ctypes.byref(p), ctypes.c_int64(blocks))
        assert 1 <= keys <= length
        assert 8 * selections * blocks * keys <= 64 << 20
        assert blocks * selections >= min(64, length // 16), "too few blocks to fill a GPU"


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [1, 8])
def test_layouts(wing, dtype, layout, shared):
    inputs = [LAYOUTS[layout](t) for t in qkv(2, 2 * shared, 2, 3, 7, 16, 8, dtype=dtype)]
    check(wing, inputs, index_rows((2, 2, 5, 3), 7, garbage=True).mT)


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shared", [1, 2, 9])
def test_every_schedule_gives_the_same_bits(wing, dtype, shared):
    inputs, indices = (
        qkv(1, 2 * shared, 2, 40, 30, 24, 16, dtype=dtype),
        index_rows((1, 2, 40, 12), 30, garbage=True),
    )
    results = [run_with_gradients(SimulatedWing(s), inputs, indices)[0] for s in SCHEDULES]
    for others in results[1:]:
        assert all(torch.equal(mine, true) for mine, true in zip(others, results[0], strict=True))
