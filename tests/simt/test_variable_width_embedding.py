"""variable_width_embedding of csrc/cuda on the simulated GPU: the tests of the op, and its bounds.

The simulation is slow: of independent parameters every pair of values is taken, not every combination.
"""

from __future__ import annotations

import pytest
import torch
from helpers.embeddings import make_ids, make_tables
from helpers.pairwise import pairwise
from ops import test_variable_width_embedding as of_the_op
from ops.test_variable_width_embedding import (  # noqa: F401
    KINDS,
    SHAPES,
    check,
    test_shapes_and_strides_of_ids,
)

from simt.device import SCHEDULES
from simt.wing import SimulatedWing

pytestmark = pytest.mark.slow
WINGS = [SimulatedWing()]
DTYPES = WINGS[0].dtypes


@pytest.fixture(autouse=True)
def _on_the_simulated_gpu(monkeypatch):
    def lookup(wing, ids, e, *, sparse=False, **options):
        assert not sparse, "the gradients of the CUDA wing are dense"
        return wing.variable_width_embedding(ids, *e.arguments, **options)

    monkeypatch.setattr(of_the_op, "lookup", lookup)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(dim, DTYPES[i % 3]) for i, dim in enumerate([1, 5, 16, 33, 72, 130])], ids=str
)
def test_odd_widths(wing, dtype, dim):
    of_the_op.test_odd_widths(wing, dtype, dim)


@pairwise(case=SHAPES, kind=KINDS, dtype=DTYPES)
def test_against_the_dense_table(wing, dtype, case, kind):
    of_the_op.test_against_the_dense_table(wing, dtype, case, kind, sparse=False)


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_padding_in_each_band(wing, dtype, count):
    of_the_op.test_padding_in_each_band(wing, dtype, count, sparse=False)


@pytest.mark.parametrize("dim", [64, 200])
def test_whole_vectors(wing, dtype, dim):
    """Rows that are copied 16 bytes at a time, and several tiles of everything."""
    check(wing, make_tables(dim, (dim, 40, 8), (30, 50, 20), dtype=dtype), make_ids("zipf", 100, 600))


def test_strided_tables(wing, dtype):
    e = make_tables(24, dtype=dtype)
    e.tables[0] = torch.randn(20, 48).to(dtype)[:, 8:32]
    e.tables[1] = torch.randn(20, 70).to(dtype)[:10].T
    check(wing, e, make_ids("uniform", 200, 90))


@pytest.mark.parametrize("bad", [-1, 200])
def test_an_id_outside_the_vocabulary_fails_an_assertion(wing, bad):
    ids = torch.tensor([3, bad, 5])
    with pytest.raises(RuntimeError, match="assertion failed: id_is_in_the_vocabulary"):
        wing.variable_width_embedding(ids, *make_tables().arguments)


def test_a_token_of_no_row_fails_an_assertion(wing):
    e = make_tables()
    e.token_row[7] = 1000
    with pytest.raises(RuntimeError, match="assertion failed: token_names_a_row"):
        wing.variable_width_embedding(torch.tensor([7]), *e.arguments)


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_every_schedule_gives_the_same_bits(wing, dtype):
    results = []
    for schedule in SCHEDULES:
        e = make_tables(dtype=dtype).require_grad()
        out = SimulatedWing(schedule).variable_width_embedding(make_ids("zipf", 200, 500), *e.arguments)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), e.leaves)])
    for others in results[1:]:
        assert all(torch.equal(mine, true) for mine, true in zip(others, results[0], strict=True))
