"""variable_width_cross_entropy in Triton, interpreted: every way through its kernels, at shapes that take no time.

`assert_equal_to_dense` (of the ordinary tests) holds value and gradients against F.cross_entropy on the assembled
logits, in float64. The fused kernels, which serve half types, are held to that in float32 too. The interpreter is
slow: of independent options every pair of values is taken, not every combination.
"""

from __future__ import annotations

import pytest
import torch
from helpers.bands import dense_loss, value_and_gradients
from helpers.compare import assert_within_budget
from helpers.pairwise import rows
from ops import test_variable_width_cross_entropy as ordinary
from ops.test_variable_width_cross_entropy import SHAPES, assert_equal_to_dense, problem, run

from sparse_attn.triton_kernels import variable_width_cross_entropy as forward
from sparse_attn.triton_kernels import variable_width_cross_entropy_backward as backward
from sparse_attn.triton_kernels.lib import matmul

PATHS = ("chunks", "fused")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """float32 through both ways of the backward."""
    width = 1024 if request.param == "fused" else 0
    monkeypatch.setattr(backward, "FUSED_WIDTH", dict.fromkeys(backward.FUSED_WIDTH, width))
    return request.param


OPTIONS = {
    "path": PATHS,
    "reduction": ["mean", "sum", "none"],
    "smoothing": [0.0, 0.1, 1.0],
    "z_loss": [0.0, 1e-2],
    "weighted": [False, True],
    "ignore_index": [-100, 3],
}


@pytest.mark.parametrize(tuple(OPTIONS), rows(**OPTIONS), indirect=["path"])
def test_every_pair_of_options(path, reduction, smoothing, z_loss, weighted, ignore_index):
    hidden, targets, bands = problem("three", 9)
    if ignore_index == 3:
        targets[targets < 0] = 3
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
    weight = torch.rand(bands.vocabulary) if weighted else None
    assert_equal_to_dense(
        "triton", hidden, targets, bands, ignore_index=ignore_index, weight=weight, **options
    )


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.startswith("wide")])
@pytest.mark.parametrize("tokens", [1, 70])
def test_shapes(path, shape, tokens):
    assert_equal_to_dense("triton", *problem(shape, tokens, ignored=tokens > 1), label_smoothing=0.05)


@pytest.mark.parametrize("shape", ["wide", "wider than a tile is deep"])
def test_wide_bands(shape):
    assert_equal_to_dense("triton", *problem(shape, 20), label_smoothing=0.05)


def test_one_split_and_small_chunks(path, monkeypatch):
    monkeypatch.setattr(forward, "MOST_SPLITS", 1)
    monkeypatch.setattr(backward, "PROGRAMS", 1)
    monkeypatch.setattr(backward, "CHUNK", 1)
    weight = torch.rand(1033)
    assert_equal_to_dense("triton", *problem("tiles", 40), label_smoothing=0.1, weight=weight)


def test_sums_of_tokens_in_splits(path):
    """More tokens than one share, so that gradients of tables are sums of splits."""
    assert_equal_to_dense("triton", *problem("three", 300), label_smoothing=0.1)


def test_tiles_of_ignored_tokens(path):
    hidden, targets, bands = problem("three", 200)
    targets[20:180] = -100
    hidden[20:180] = torch.nan
    hidden[20:30] = torch.inf
    kept = torch.cat([torch.arange(20), torch.arange(180, 200)])
    ours = value_and_gradients(lambda h, b: run(h, targets, b, "triton"), hidden, bands)
    want = value_and_gradients(lambda h, b: run(h, targets[kept], b, "triton"), hidden[kept], bands)
    assert not ours[1][20:180].count_nonzero()
    ours[1] = ours[1][kept]
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smooth"])
def test_half_types(path, dtype, options):
    """Beside PyTorch's dense head in the same dtype."""
    hidden, targets, bands = problem("tiles", 60, dtype=dtype)
    full = bands.to(torch.float64)
    ours = value_and_gradients(lambda h, b: run(h, targets, b, "triton", **options), hidden, bands)
    theirs = value_and_gradients(lambda h, b: dense_loss(h, targets, b, **options), hidden, bands)
    exact = value_and_gradients(lambda h, b: dense_loss(h, targets, b, **options), hidden.double(), full)
    for i, (mine, torchs, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_within_budget(mine.to(dtype), torchs, true, f"output {i}")


def test_float16_gradients_of_a_small_factor_do_not_vanish(path):
    """As of a mean over a thousand tokens: in between, every number must stay a normal one."""
    hidden, targets, bands = problem("tiles", 60, dtype=torch.float16)
    leaves = [t.clone().requires_grad_() for t in (hidden, *bands.parameters)]
    loss = run(leaves[0], targets, bands.with_parameters(leaves[1:]), "triton", reduction="sum")
    large = torch.autograd.grad(loss, leaves, torch.tensor(1.0), retain_graph=True)
    small = torch.autograd.grad(loss, leaves, torch.tensor(2.0**-10))
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(b.float() * 2**10, a.float(), rtol=2**-9, atol=2**-14)


@pytest.mark.parametrize(
    "name",
    [
        "projection_of_a_band_of_full_width",
        "large_logits",
        "leading_dimensions_and_strides",
        "int32_targets_and_int64_maps",
        "nan_stays_in_its_token",
        "compile_is_one_graph",
        "autocast",
        "second_order_is_refused",
        "a_frozen_table_gets_no_gradient",
    ],
)
def test_as_the_other_wings(name):
    getattr(ordinary, f"test_{name}")("triton")


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_target_counts(path, tokens, reduction):
    ordinary.test_no_target_counts("triton", tokens, reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(dtype, weighted):
    ordinary.test_opcheck("triton", dtype, weighted)


def test_same_bits_again(path):
    hidden, targets, bands = problem("tiles", 80, dtype=torch.bfloat16)
    first, second = (
        value_and_gradients(lambda h, b: run(h, targets, b, "triton", label_smoothing=0.1), hidden, bands)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_targets_and_rows_out_of_range_are_read_nowhere():
    """Past the checks in Python: on a device the kernel asserts, here it must do no harm."""
    hidden, targets, bands = problem("three", 7, ignored=False)
    projections = [torch.empty(0, 0) if p is None else p for p in bands.projections]

    def call(targets, row):
        others = (bands.tables, projections, bands.token_band, row, None)
        loss, lse = forward.variable_width_cross_entropy(hidden, targets, *others, -100, 0.1)
        backward.variable_width_cross_entropy_backward(
            torch.ones(7), torch.ones(7), hidden, targets, *others, lse, -100, 0.1
        )
        return loss

    wrong = targets.clone()
    wrong[[1, 3]] = torch.tensor([52, -(2**62)])
    loss = call(wrong, bands.token_row)
    assert loss.count_nonzero() == 5
    call(targets, bands.token_row + 10**6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 33, 5), (5, 600, 40), (130, 300, 70)], ids=str)
def test_matmul(dtype, shape):
    m, k, n = shape
    a, b = torch.randn(k, m).to(dtype).t(), torch.randn(k, 2 * n).to(dtype)[:, ::2]
    ours = matmul.product(a, b)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
