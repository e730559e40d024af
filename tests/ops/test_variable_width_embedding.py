"""`variable_width_embedding`, forward and gradients, against the dense table that it stands for, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.embeddings import Tables, make_ids, make_tables
from torch.utils._pytree import tree_map_only

import sparse_attn

KINDS = ("zipf", "uniform", "equal")
SHAPES = {
    "three bands": ((24, 10, 3), (20, 70, 110)),
    "one full band": ((24,), (50,)),
    "one narrow band": ((1,), (50,)),
    "projected though full": ((24, 24), (9, 30)),
    "wider than the model's tiles": ((7, 24, 5, 24), (3, 40, 60, 1)),
}


def lookup(wing, ids, e: Tables, **options):
    """CPU tensors in and out, whatever the wing's device; gradients come back too."""
    sizes = {"bands": len(e.tables), "sparse_gradients": int(options.get("sparse", False))}
    why_not = None if wing.missing else wing.refuses("variable_width_embedding", e.tables[0].dtype, **sizes)
    if why_not and "up to" in why_not:
        pytest.skip(why_not)
    ids, *arguments = tree_map_only(torch.Tensor, lambda t: t.to(wing.device), (ids, *e.arguments))
    return sparse_attn.variable_width_embedding(ids, *arguments, backend=wing.name, **options).cpu()


def only_cpu(wing):
    if wing.device != "cpu":
        pytest.skip("CPU tensors")


def expected(e: Tables, ids, grad_out, padding_idx=None):
    """(out, gradients of tables and projections) in float64, by the dense table."""
    exact = e.to(torch.float64).require_grad()
    out = F.embedding(ids, exact.dense(padding_idx))
    grads = torch.autograd.grad(out, exact.leaves, grad_out.double(), allow_unused=True)
    return out.detach(), [
        torch.zeros_like(t) if g is None else g for t, g in zip(exact.leaves, grads, strict=True)
    ]


def assert_near(ours, exact, name, roundings=8, terms=None):
    """Within some roundings of the largest value: 8 in float32 for sums of many terms, one in the half types.

    Where terms cancel, what their rounding leaves depends on their order, which is the machine's: within one
    rounding of the largest sum of absolute `terms` then.
    """
    assert ours.shape == exact.shape, f"{name}: {list(ours.shape)}, want {list(exact.shape)}"
    if not exact.numel():
        return
    units = roundings if ours.dtype in (torch.float32, torch.float64) else 1
    allowed = units * torch.finfo(ours.dtype).eps * max(exact.abs().max().item(), 1e-30)
    if terms is not None and ours.dtype in (torch.float32, torch.float64):
        allowed = max(allowed, torch.finfo(ours.dtype).eps * terms.max().item())
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(wing, e: Tables, ids, *, padding_idx=None, sparse=False):
    e.require_grad()
    options = {"padding_idx": padding_idx, "sparse": sparse}
    out = lookup(wing, ids, e, **options)
    dim = e.dense().shape[1]
    assert out.shape == (*ids.shape, dim)
    assert out.dtype == e.tables[0].dtype
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = torch.autograd.grad(out, e.leaves, grad_out)
    want, want_grads = expected(e, ids, grad_out, padding_idx)
    assert_near(out.detach(), want, "out")
    _, terms = expected(e.sizes(), ids, grad_out.abs(), padding_idx)
    for number, (ours, exact, sums) in enumerate(zip(grads, want_grads, terms, strict=True)):
        table = number < len(e.tables)
        assert ours.layout == (torch.sparse_coo if sparse and table else torch.strided)
        if sparse and table:
            assert ours.is_coalesced()
            rows = ours.indices()[0]
            assert bool((rows.diff() > 0).all())
            ours = ours.to_dense()
        assert ours.dtype == out.dtype
        assert_near(ours, exact, f"gradient {number}", roundings=16, terms=sums)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES)
def test_against_the_dense_table(wing, dtype, case, kind, sparse):
    widths, sizes = SHAPES[case]
    e = make_tables(24, widths, sizes, dtype=dtype)
    if case == "projected though full":
        e.projections[1] = torch.randn(24, 24).to(dtype) / 5
    check(wing, e, make_ids(kind, sum(sizes), 400), sparse=sparse)


@pytest.mark.parametrize("dim", [1, 5, 16, 33, 72, 130])
def test_odd_widths(wing, dtype, dim):
    widths = (dim, max(1, dim // 2), max(1, dim // 7), 1)
    e = make_tables(dim, widths, (5, 90, 200, 13), dtype=dtype)
    for count in (1, 2, 11, 700):
        check(wing, e, make_ids("uniform", 308, count, seed=count))


def test_many_distinct_rows(wing):
    """More than one block of rows, and of a projection's sum."""
    e = make_tables(40, (40, 20), (500, 1500))
    check(wing, e, torch.randperm(2000).repeat(2))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_padding_in_each_band(wing, dtype, count, sparse):
    for band in range(3):
        e = make_tables(dtype=dtype)
        padding_idx = int((e.token_band == band).nonzero()[3])
        ids = make_ids("uniform", 200, count)
        ids[: count // 3] = padding_idx
        check(wing, e, ids, padding_idx=padding_idx, sparse=sparse)
        out = lookup(wing, ids, e, padding_idx=padding_idx - 200)
        assert not out[ids == padding_idx].any()
        # The padding row holds NaN: nothing of it may come out.
        with torch.no_grad():
            e.tables[band][int(e.token_row[padding_idx])] = torch.nan
        out = lookup(wing, ids, e, padding_idx=padding_idx)
        assert not out.isnan().any()
        grads = torch.autograd.grad(out.float().sum(), e.leaves)
        assert not any(g.isnan().any() for g in grads)


def test_shapes_and_strides_of_ids(wing):
    e = make_tables().require_grad()
    ids = torch.randint(200, (6, 8, 10))
    for view in (
        ids,
        ids[..., ::2],
        ids.transpose(0, 2),
        ids[1:1],
        ids[0, 0, 0],
        ids[:, :1].expand(6, 4, 10),
    ):
        for dtype in (torch.int32, torch.int64):
            check(wing, e, view.to(dtype))


def test_strided_tables(wing):
    """Tables and projections that are views."""
    e = make_tables()
    wide = torch.randn(20, 60)
    e.tables[0] = wide[:, 3:27]
    e.tables[1] = torch.randn(10, 70).t()
    e.projections[1] = torch.randn(10, 24).t()
    check(wing, e, make_ids("uniform", 200, 100))


def test_expanded_grad_out(wing, dtype):
    e = make_tables(dtype=dtype).require_grad()
    ids = make_ids("uniform", 200, 50)
    ours = torch.autograd.grad(lookup(wing, ids, e).sum(), e.leaves)
    _, want = expected(e, ids, torch.ones(50, 24))
    for number, (a, b) in enumerate(zip(ours, want, strict=True)):
        assert_near(a, b, f"gradient {number}", roundings=16)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_ids_of_one_band_and_of_none(wing, band):
    """Every id in one band; the other bands are hit by no id, and their gradients are 0."""
    e = make_tables()
    tokens = (e.token_band == band).nonzero().squeeze(1)
    check(wing, e, tokens.repeat(3))
    check(wing, e, tokens.repeat(3), sparse=True)


def test_one_token_and_empty_bands(wing):
    for widths, sizes in (((4,), (1,)), ((2,), (1,)), ((4, 2, 3), (0, 1, 0)), ((4, 2), (3, 0))):
        e = make_tables(4, widths, sizes)
        for sparse in (False, True):
            check(wing, e, torch.zeros(9, dtype=torch.int64), sparse=sparse)
            check(wing, e, torch.zeros(0, dtype=torch.int64), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_shared_rows(wing, sparse):
    """Tokens that share a row share its gradient."""
    e = make_tables()
    e.token_row = e.token_row // 3
    check(wing, e, make_ids("uniform", 200, 500), sparse=sparse)


def test_few_ids_of_a_large_vocabulary(wing):
    """Few ids are looked up in a hash table instead of an array."""
    e = make_tables(6, (6, 2), (1000, 60000))
    for count in (1, 5, 40):
        check(wing, e, make_ids("uniform", 61000, count, seed=count), sparse=True)


def test_integer_types_of_the_maps(wing):
    e = make_tables()
    ids = make_ids("zipf", 200, 64)
    want = lookup(wing, ids, e)
    for band, row in itertools.product((torch.uint8, torch.int32, torch.int64), (torch.int16, torch.int64)):
        cast = Tables(e.tables, e.projections, e.token_band.to(band), e.token_row.to(row))
        assert torch.equal(lookup(wing, ids, cast), want)


@pytest.mark.torch_defaults
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_number_of_threads(wing, dtype, sparse):
    only_cpu(wing)
    if wing.name != "cpu":
        pytest.skip("the promise is the CPU wing's")
    e = make_tables(72, (72, 33, 8), (100, 900, 2000), dtype=dtype).require_grad()
    ids = make_ids("zipf", 3000, 40000)
    grad_out = torch.randn(40000, 72).to(dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        out = lookup(wing, ids, e, sparse=sparse)
        grads = torch.autograd.grad(out, e.leaves, grad_out)
        results.append([out, *(g.to_dense() if g.is_sparse else g for g in grads)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_error_budget(wing, dtype):
    """No less exact than PyTorch's own mask, lookup, projection and assignment in the same dtype."""
    e = make_tables(64, (64, 32), (50, 400), dtype=dtype)
    ids = make_ids("zipf", 450, 3000)
    grad_out = torch.randn(3000, 64).to(dtype)
    exact, exact_grads = expected(e, ids, grad_out)
    e.require_grad()
    ours = lookup(wing, ids, e)
    ours_grads = torch.autograd.grad(ours, e.leaves, grad_out)
    plain = torch.empty(3000, 64, dtype=dtype)
    for b, (table, projection) in enumerate(zip(e.tables, e.projections, strict=True)):
        own = e.token_band[ids] == b
        rows = F.embedding(e.token_row[ids[own]].long(), table)
        plain = plain.index_put((own,), rows if projection is None else F.linear(rows, projection))
    plain_grads = torch.autograd.grad(plain, e.leaves, grad_out)
    triples = [(ours, plain, exact), *zip(ours_grads, plain_grads, exact_grads, strict=True)]
    for mine, theirs, true in triples:
        error, other = (mine.double() - true).abs(), (theirs.double() - true).abs()
        slack = torch.finfo(dtype).eps * true.abs().mean() / 8
        assert error.mean() <= 1.5 * other.mean() + slack


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_gradcheck(padding_idx):
    e = make_tables(5, (5, 3, 2), (4, 5, 6), dtype=torch.float64).require_grad()
    ids = torch.tensor([[0, 4, 9], [4, 4, 14]])

    def f(*leaves):
        projections = [None, *leaves[3:]]
        return sparse_attn.variable_width_embedding(
            ids, leaves[:3], projections, e.token_band, e.token_row, padding_idx=padding_idx
        )

    assert torch.autograd.gradcheck(f, e.leaves)


def test_only_what_is_asked_for_gets_a_gradient(wing):
    ids = make_ids("zipf", 200, 90)
    for frozen in (["tables"], ["projections"], [0], [1]):
        e = make_tables().require_grad()
        full = make_tables().require_grad()
        for leaf in e.tables if "tables" in frozen else []:
            leaf.requires_grad_(False)
        for leaf in e.projections[1:] if "projections" in frozen else []:
            leaf.requires_grad_(False)
        for b in frozen:
            if isinstance(b, int):
                e.tables[b].requires_grad_(False)
        lookup(wing, ids, e).square().sum().backward()
        lookup(wing, ids, full).square().sum().backward()
        for mine, want in zip(e.leaves, full.leaves, strict=True):
            if mine.requires_grad:
                assert torch.equal(mine.grad, want.grad)
            else:
                assert mine.grad is None


def test_second_derivatives_are_refused(wing):
    e = make_tables().require_grad()
    out = lookup(wing, make_ids("zipf", 200, 9), e)
    grads = torch.autograd.grad(out.square().sum(), e.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grads[0].sum().backward()


# ---- torch's machinery -----------------------------------------------------------------------------------


@pytest.mark.torch_defaults
@pytest.mark.parametrize("padding_idx", [-1, 5])
def test_opcheck(wing, padding_idx):
    only_cpu(wing)
    e = make_tables().require_grad()
    projections = [torch.empty(0, 0) if p is None else p for p in e.projections]
    ids = make_ids("zipf", 200, 30).view(5, 6)
    arguments = (ids, e.tables, projections, e.token_band, e.token_row, padding_idx, False)
    torch.library.opcheck(getattr(torch.ops.sparse_attn.variable_width_embedding, wing.name), arguments)
    detached = (ids, [t.detach() for t in e.tables], [p.detach() for p in projections], *arguments[3:])
    op = getattr(torch.ops.sparse_attn.variable_width_embedding_backward, wing.name)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(op, (torch.randn(5, 6, 24), *detached, *needs))
    sparse = (torch.randn(5, 6, 24), *detached[:-1], True, True, True)
    torch.library.opcheck(op, sparse, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.torch_defaults
def test_fullgraph_compile(wing):
    only_cpu(wing)
    torch._dynamo.reset()
    e = make_tables().require_grad()

    def f(ids, tables, projections):
        out = sparse_attn.variable_width_embedding(
            ids * 1, tables, projections, e.token_band, e.token_row, padding_idx=3, backend=wing.name
        )
        return out * 2

    compiled_f = torch.compile(f, fullgraph=True)
    for shape in ((40,), (3, 9), (4, 9)):
        ids = torch.randint(200, shape)
        out, want = compiled_f(ids, e.tables, e.projections), f(ids, e.tables, e.projections)
        assert torch.equal(out, want)
        ours = torch.autograd.grad(out.square().sum(), e.leaves)
        theirs = torch.autograd.grad(want.square().sum(), e.leaves)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_nothing(wing):
    only_cpu(wing)
    e = make_tables().require_grad()
    ids = make_ids("zipf", 200, 40)
    want = lookup(wing, ids, e)
    with torch.autocast("cpu", torch.bfloat16):
        out = lookup(wing, ids, e)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.sum(), e.leaves)
    assert all(g.dtype == torch.float32 for g in grads)


def test_float64_runs_on_the_reference():
    e = make_tables(dtype=torch.float64)
    out = sparse_attn.variable_width_embedding(torch.arange(200), *e.arguments)
    assert torch.equal(out, e.dense()) or (out - e.dense()).abs().max() < 1e-14
