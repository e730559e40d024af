"""variable_width_embedding in Triton, interpreted: every way through its kernels, at shapes that take no time.

`check` (of the ordinary tests) holds the output and all gradients against the dense table in float64. The interpreter
is slow: of independent parameters every pair of values is taken, not every combination.
"""

from __future__ import annotations

import pytest
import torch
from helpers.embeddings import Tables, make_ids, make_tables
from helpers.pairwise import pairwise
from ops.test_variable_width_embedding import KINDS, SHAPES, check, expected, lookup

from sparse_attn.triton_kernels import variable_width_embedding as forward
from sparse_attn.triton_kernels.lib import run_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pairwise(case=SHAPES, dtype=DTYPES, kind=KINDS, sparse=[False, True])
def test_shapes(wing, dtype, case, kind, sparse):
    widths, sizes = SHAPES[case]
    e = make_tables(24, widths, sizes, dtype=dtype)
    if case == "projected though full":
        e.projections[1] = torch.randn(24, 24).to(dtype) / 5
    check(wing, e, make_ids(kind, sum(sizes), 70), sparse=sparse)


@pairwise(dim=[1, 17, 130], dtype=DTYPES, count=[1, 33])
def test_odd_sizes(wing, dtype, dim, count):
    widths = (dim, max(1, dim // 2), max(1, dim // 7), 1)
    check(wing, make_tables(dim, widths, (5, 9, 20, 3), dtype=dtype), make_ids("uniform", 37, count))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_more_bands_than_one_launch_takes(wing, padding_idx):
    e = make_tables(12, (12, 5, 12, 3, 2, 1, 7, 4, 6), (4, 5, 6, 7, 8, 9, 2, 3, 4))
    check(wing, e, make_ids("uniform", 48, 60), padding_idx=padding_idx)


@pairwise(kind=KINDS, dtype=DTYPES, padding_idx=[None, 7])
def test_positions_sorted_by_row(wing, dtype, kind, padding_idx, monkeypatch):
    """As for wide projections."""
    monkeypatch.setattr(forward, "SORT_FROM", 0)
    check(wing, make_tables(dtype=dtype), make_ids(kind, 200, 70), padding_idx=padding_idx)


def test_large_configuration(wing, monkeypatch):
    """The tiles of a full batch, which a few ids do not get by themselves."""
    monkeypatch.setattr(forward, "forward_configs", lambda *_: [(64, 128, 64, 4)])
    check(wing, make_tables(150, (150, 70, 3), dtype=torch.bfloat16), make_ids("zipf", 200, 90))


@pairwise(kind=KINDS, dtype=DTYPES, sparse=[False, True])
def test_runs_across_tiles(wing, dtype, kind, sparse, monkeypatch):
    """Runs that end with a tile, cross some and fill more than a block of partial sums."""
    monkeypatch.setattr(run_sums, "TILE", 4)
    e = make_tables(20, (20, 7), (3, 9), dtype=dtype)
    check(wing, e, make_ids(kind, 12, 150), sparse=sparse)
    ids = (torch.arange(12).repeat_interleave(4)).roll(3)  # every run begins or ends on a border
    check(wing, e, ids, sparse=sparse)
    check(wing, e, ids.sort().values, sparse=sparse)


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_same_bits_again(wing, dtype, monkeypatch):
    monkeypatch.setattr(run_sums, "TILE", 8)
    ids = make_ids("zipf", 200, 60)
    upstream = torch.randn(60, 24).to(dtype)

    def gradients():
        e = make_tables(dtype=dtype).require_grad()
        return torch.autograd.grad(lookup(wing, ids, e), e.leaves, upstream)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pairwise(band=[0, 1, 2], count=[0, 7, 30], sparse=[False, True])
def test_padding_in_each_band(wing, count, band, sparse):
    e = make_tables()
    padding_idx = int((e.token_band == band).nonzero()[3])
    ids = make_ids("uniform", 200, count)
    ids[: count // 3] = padding_idx
    check(wing, e, ids, padding_idx=padding_idx, sparse=sparse)
    with torch.no_grad():
        e.tables[band][int(e.token_row[padding_idx])] = torch.nan
    out = lookup(wing, ids, e, padding_idx=padding_idx)
    assert not out.isnan().any()
    assert not any(g.isnan().any() for g in torch.autograd.grad(out.sum(), e.leaves))


def test_nan_stays_in_its_rows(wing):
    """A NaN row, and a NaN in grad_out, in tiles with other bands."""
    e, ids = make_tables().require_grad(), make_ids("zipf", 200, 60)
    bad = int(ids[11])
    with torch.no_grad():
        e.tables[int(e.token_band[bad])][int(e.token_row[bad])] = torch.nan
    out = lookup(wing, ids, e)
    assert torch.equal(out.isnan().all(1), ids == bad)
    assert torch.equal(out.isnan().any(1), ids == bad)
    upstream = torch.ones(60, 24)
    upstream[20] = torch.nan
    other = int(ids[20])
    for b, grad in enumerate(torch.autograd.grad(out, e.tables, upstream)):
        want = torch.zeros(len(grad), dtype=torch.bool)
        if b == int(e.token_band[other]):
            want[int(e.token_row[other])] = True
        assert torch.equal(grad.isnan().any(1), want)


@BOTH
@pytest.mark.parametrize("band", [0, 1, 2])
def test_ids_of_one_band(wing, band, sparse):
    e = make_tables()
    check(wing, e, (e.token_band == band).nonzero().squeeze(1)[-12:].repeat(3), sparse=sparse)


@BOTH
def test_one_token_and_empty_bands(wing, sparse):
    for widths, sizes in (((4,), (1,)), ((4, 2, 3), (0, 1, 0)), ((4, 2), (3, 0))):
        e = make_tables(4, widths, sizes)
        check(wing, e, torch.zeros(9, dtype=torch.int64), sparse=sparse)
        check(wing, e, torch.zeros(0, dtype=torch.int64), sparse=sparse)


def test_layouts(wing):
    """Strided ids, int32 ids and int64 maps, strided tables, shared rows, an expanded gradient."""
    e = make_tables()
    ids = torch.randint(200, (3, 4, 6))
    for view in (ids[..., ::2], ids.transpose(0, 2), ids[1:1], ids[0, 0, 0], ids[:, :1].expand(3, 2, 6)):
        check(wing, e, view.int())
    e.tables[0] = torch.randn(20, 60)[:, 3:27]
    e.tables[1] = torch.randn(10, 70).t()
    e.projections[1] = torch.randn(10, 24).t()
    e.token_row = e.token_row.long() // 3
    check(wing, e, make_ids("zipf", 200, 24))
    e = make_tables().require_grad()
    ids = make_ids("zipf", 200, 24)
    _, want = expected(e, ids, torch.ones(24, 24))
    for ours, exact in zip(torch.autograd.grad(lookup(wing, ids, e).sum(), e.leaves), want, strict=True):
        torch.testing.assert_close(ours, exact.float())


@pytest.mark.parametrize("frozen", ["tables", "projections"])
def test_only_what_is_asked_for(wing, frozen):
    e, full = make_tables().require_grad(), make_tables().require_grad()
    for leaf in e.tables if frozen == "tables" else e.projections[1:]:
        leaf.requires_grad_(False)
    ids = make_ids("zipf", 200, 40)
    for each in (e, full):
        lookup(wing, ids, each).square().sum().backward()
    for mine, want in zip(e.leaves, full.leaves, strict=True):
        assert mine.grad is None if not mine.requires_grad else torch.equal(mine.grad, want.grad)


def test_ids_out_of_range_are_read_nowhere(wing):
    """Past the checks in Python: on a device the kernel asserts, here it must do no harm."""
    e = make_tables()
    projections = [torch.empty(0, 0) if p is None else p for p in e.projections]
    ids = torch.tensor([3, -1, 200, 2**40, 5, -(2**62)])
    out = forward.variable_width_embedding(ids, e.tables, projections, e.token_band, e.token_row, -1, False)
    assert torch.equal(out[[0, 4]], lookup(wing, torch.tensor([3, 5]), e))
    assert not out[[1, 2, 3, 5]].any()
    wrong = e.token_row + 10**6
    out = forward.variable_width_embedding(ids, e.tables, projections, e.token_band, wrong, -1, False)
    assert not out.any()


def test_keys_of_tables_past_two_to_the_31():
    tables = [torch.zeros(1, 1).expand(2**30, 1)] * 3
    e = Tables(tables, [None] * 3, torch.tensor([0, 2, 1]).int(), torch.tensor([5, 2**30 - 1, 7]))
    keys, stride = forward.row_keys(torch.tensor([0, 1, 2, 9]), e.tables, e.token_band, e.token_row, 2)
    assert stride == 2**30
    assert keys.tolist() == [5, 3 * 2**30 - 1, 3 * 2**30, 3 * 2**30]
