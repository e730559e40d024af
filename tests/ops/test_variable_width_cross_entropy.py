"""`variable_width_cross_entropy` against F.cross_entropy on the assembled logits: values, gradients, arguments."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from helpers import bands as helper
from helpers.bands import dense_loss, value_and_gradients
from helpers.compare import assert_within_budget
from helpers.wings import overload, wings_under_test
from torch.utils._pytree import tree_map_only

import sparse_attn
import sparse_attn.wings.reference.chunks
from sparse_attn.wings import extension

NATIVE = pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
# name → (backend, device)
PLACES = {
    str(w): (w.name, w.device)
    for w in wings_under_test()
    if w.device != "mps"
    and w.refuses("variable_width_cross_entropy") != "it has no variable_width_cross_entropy"
}
WINGS = pytest.mark.parametrize("name", [pytest.param(n, marks=NATIVE if n == "cpu" else ()) for n in PLACES])
SHAPES = {  # D, sizes, widths
    "three": (16, (5, 7, 40), (16, 8, 3)),
    "tiles": (40, (300, 33, 700), (40, 17, 5)),
    "wide": (600, (70, 1), (600, 33)),
    "wider than a tile is deep": (520, (150, 20), (300, 520)),
    "one token": (8, (1,), (8,)),
    "one token and a band of one": (24, (1, 1, 9), (5, 24, 24)),
    "an empty band": (12, (6, 0, 3), (12, 4, 2)),
    "width one": (9, (40, 11), (1, 9)),
}


def run(hidden, targets, bands, name, **options):
    """CPU tensors in and out, whatever the wing's device; gradients come back too."""
    backend, device = PLACES.get(name, (name, "cpu"))
    arguments = (hidden, targets, bands.tables, bands.projections, bands.token_band, bands.token_row)
    arguments, options = tree_map_only(torch.Tensor, lambda t: t.to(device), (arguments, options))
    return sparse_attn.variable_width_cross_entropy(*arguments, backend=backend, **options).cpu()


def only_cpu(name):
    if PLACES.get(name, (name, "cpu"))[1] != "cpu":
        pytest.skip("CPU tensors")


def problem(shape="three", tokens=7, seed=1, ignored=True, dtype=torch.float32):
    bands = helper.make(*SHAPES[shape]).to(dtype)
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, SHAPES[shape][0]).to(dtype)
    targets = torch.randint(bands.vocabulary, (tokens,))
    if ignored:
        targets[1::3] = -100
    return hidden, targets, bands


def assert_equal_to_dense(name, hidden, targets, bands, **options):
    """Value and all gradients in float32, beside float64 of the dense formula and the error PyTorch makes."""
    ours = value_and_gradients(lambda h, b: run(h, targets, b, name, **options), hidden, bands)
    theirs = value_and_gradients(lambda h, b: dense_loss(h, targets, b, **options), hidden, bands)
    exact = value_and_gradients(
        lambda h, b: dense_loss(h, targets, b, **options), hidden.double(), bands.to(torch.float64)
    )
    largest = float((hidden.double() @ bands.to(torch.float64).dense().t()).abs().max())
    scale = max(float(t.abs().max()) for t in exact[1:] if t.numel())
    for i, (mine, torchs, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == true.shape
        if not true.numel():
            continue
        # A gradient that cancels (one class: P − Y = 0) keeps the roundings of its terms, which are of `scale`.
        floor = torch.finfo(torch.float32).eps * (4 if i == 0 else 4 * max(scale, 0.1))
        error = (mine.double() - true).abs().max()
        # e^(z − lse) has the rounding of lse as a factor.
        floor = floor + 2**-24 * largest * (1 if i == 0 else scale)
        allowed = 2 * (torchs.double() - true).abs().max() + 16 * 2**-23 * true.abs().max() + floor
        assert error <= allowed, f"output {i}: error {error:.3g}, allowed {allowed:.3g}"


# ---- the same numbers as F.cross_entropy --------------------------------------------------------------------


@WINGS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_every_combination(name, reduction, smoothing, z_loss, weighted, ignore_index):
    hidden, targets, bands = problem("three", 9)
    if ignore_index == 3:
        targets[targets < 0] = 3
    weight = torch.rand(bands.vocabulary) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "weight": weight}
    assert_equal_to_dense(name, hidden, targets, bands, ignore_index=ignore_index, **options)


@WINGS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 13, 95, 97, 200])
def test_shapes(name, shape, tokens):
    assert_equal_to_dense(name, *problem(shape, tokens, ignored=tokens > 1), label_smoothing=0.05)


@WINGS
def test_projection_of_a_band_of_full_width(name):
    _, targets, _ = problem("three", 9)
    bands = helper.make(*SHAPES["three"], project_all=True)
    assert_equal_to_dense(name, torch.randn(9, 16), targets, bands)


@WINGS
def test_large_logits(name):
    """Logits of ±300 in one band: exp must not overflow, nor the sum lose the other bands."""
    hidden, targets, bands = problem("three", 9)
    bands.tables[1] *= 100
    assert_equal_to_dense(name, hidden, targets, bands)
    bands.tables[0] -= 50 * hidden[0]
    assert_equal_to_dense(name, hidden, targets, bands)


@WINGS
def test_leading_dimensions_and_strides(name):
    hidden, targets, bands = problem("three", 24)
    flat = run(hidden, targets, bands, name, reduction="none")
    shaped = run(hidden.view(2, 3, 4, 16), targets.view(2, 3, 4), bands, name, reduction="none")
    assert shaped.shape == (2, 3, 4)
    assert torch.equal(shaped.flatten(), flat)
    spread = torch.stack([hidden, hidden + 1], dim=2)[:, :, 0]
    strided = helper.Bands([t.t().contiguous().t() for t in bands.tables], *list(vars(bands).values())[1:])
    torch.testing.assert_close(run(spread, targets, strided, name, reduction="none"), flat)
    assert run(hidden[0], targets[0], bands, name).shape == ()


@WINGS
def test_int32_targets_and_int64_maps(name):
    hidden, targets, bands = problem()
    wide = helper.Bands(bands.tables, bands.projections, bands.token_band.long(), bands.token_row.long())
    assert torch.equal(run(hidden, targets.int(), wide, name), run(hidden, targets, bands, name))


@WINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name, dtype):
    """Beside PyTorch's dense head in the same dtype: its logits are rounded, ours are not."""
    hidden, targets, bands = problem("tiles", 60, dtype=dtype)
    full = bands.to(torch.float64)
    ours = value_and_gradients(lambda h, b: run(h, targets, b, name), hidden, bands)
    theirs = value_and_gradients(lambda h, b: dense_loss(h, targets, b), hidden, bands)
    exact = value_and_gradients(lambda h, b: dense_loss(h, targets, b), hidden.double(), full)
    assert ours[0].dtype == torch.float32
    for i, (mine, torchs, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_within_budget(mine.to(dtype), torchs, true, f"output {i}")


@pytest.mark.slow
def test_reference_in_float64():
    bands = helper.make(5, (2, 3, 4), (5, 3, 2))
    hidden, targets = torch.randn(4, 5), torch.tensor([1, -100, 8, 3])
    leaves = [t.double().requires_grad_() for t in (hidden, *bands.parameters)]
    weight = torch.rand(bands.vocabulary, dtype=torch.float64)
    for reduction, smoothing, weighted in itertools.product(("mean", "none"), (0.0, 0.2), (False, True)):
        options = {"label_smoothing": smoothing, "weight": weight if weighted else None, "z_loss": 1e-2}

        def loss(h, *p, options=options, reduction=reduction):
            return run(h, targets, bands.with_parameters(p), "reference", reduction=reduction, **options)

        assert torch.autograd.gradcheck(loss, leaves)


def test_reference_in_chunks(monkeypatch):
    hidden, targets, bands = problem("three", 20)
    whole = value_and_gradients(lambda h, b: run(h, targets, b, "reference"), hidden, bands)
    monkeypatch.setattr(sparse_attn.wings.reference.chunks, "_ELEMENTS", 300)
    chunked = value_and_gradients(lambda h, b: run(h, targets, b, "reference"), hidden, bands)
    torch.testing.assert_close(chunked, whole)


# ---- nothing to do, and NaN ---------------------------------------------------------------------------------


@WINGS
@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_target_counts(name, tokens, reduction):
    hidden, targets, bands = problem("three", tokens)
    targets[:] = -100
    out = value_and_gradients(lambda h, b: run(h, targets, b, name, reduction=reduction), hidden, bands)
    want = dense_loss(hidden, targets, bands, reduction=reduction)
    torch.testing.assert_close(out[0], want, equal_nan=True)
    for gradient in out[1:]:
        assert not gradient.count_nonzero()


@WINGS
def test_nan_stays_in_its_token(name):
    hidden, targets, bands = problem("tiles", 110)
    hidden[2] = torch.nan
    hidden[1] = torch.nan  # an ignored one
    loss, grad_hidden, *_ = value_and_gradients(
        lambda h, b: run(h, targets, b, name, reduction="none"), hidden, bands
    )
    assert loss.isnan().nonzero().flatten().tolist() == [2]
    assert grad_hidden.isnan().any(1).nonzero().flatten().tolist() == [2]


@WINGS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_incoming_gradient_that_is_no_number(name, value, smoothing):
    """As one is after an overflow: it spoils its own token, and the process goes on."""
    hidden, targets, bands = problem("tiles", 110, ignored=False)
    hidden.requires_grad_()
    loss = run(hidden, targets, bands, name, reduction="none", label_smoothing=smoothing)
    upstream = torch.ones(110)
    upstream[7] = value
    (grad,) = torch.autograd.grad(loss, hidden, upstream)
    assert (~grad.isfinite()).any(1).nonzero().flatten().tolist() == [7]


# ---- determinism, memory ------------------------------------------------------------------------------------


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype):
    hidden, targets, bands = problem("tiles", 300, dtype=dtype)
    outputs = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        outputs.append(
            value_and_gradients(
                lambda h, b: run(h, targets, b, "cpu", label_smoothing=0.1, z_loss=1e-3), hidden, bands
            )
        )
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


PEAK = Path("/proc/self/clear_refs")


@NATIVE
@pytest.mark.skipif(not PEAK.exists(), reason="the peak of a process is read from Linux's /proc")
def test_no_logits_are_stored():
    bands = helper.make(64, (1000, 40000), (64, 8))
    hidden, targets = torch.randn(2048, 64), torch.randint(bands.vocabulary, (2048,))

    def resident(field: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0]) * 1024

    def call(tokens):
        value_and_gradients(lambda h, b: run(h, targets[:tokens], b, "cpu"), hidden[:tokens], bands)

    call(100)
    gc.collect()
    PEAK.write_text("5")
    before = resident("VmRSS")
    call(2048)
    logits = 4 * 2048 * bands.vocabulary
    assert resident("VmHWM") - before < logits / 10


# ---- inside PyTorch -----------------------------------------------------------------------------------------


@WINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(name, dtype, weighted):
    only_cpu(name)
    hidden, targets, bands = problem("three", 5, dtype=dtype)
    tables = [t.requires_grad_() for t in bands.tables]
    projections = [
        torch.empty(0, 0, dtype=dtype) if p is None else p.requires_grad_() for p in bands.projections
    ]
    weight = torch.rand(bands.vocabulary) if weighted else None
    maps = (bands.token_band, bands.token_row)
    arguments = (hidden.requires_grad_(), targets, tables, projections, *maps, weight, -100, 0.1)
    torch.library.opcheck(overload("variable_width_cross_entropy", name), arguments)
    grads = (torch.rand(5), torch.rand(5))
    lse = torch.rand(5) + 4
    torch.library.opcheck(
        overload("variable_width_cross_entropy_backward", name),
        (*grads, hidden.detach(), targets, [t.detach() for t in tables], [p.detach() for p in projections],
         *maps, weight, lse, -100, 0.1),
    )  # fmt: skip


@WINGS
def test_compile_is_one_graph(name):
    torch._dynamo.reset()
    hidden, targets, bands = problem("three", 9)
    weight = torch.rand(bands.vocabulary)

    def eager(h, b):
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, "weight": weight}
        return run(h * 2, targets, b, name, **options)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    ours = value_and_gradients(compiled, hidden, bands)
    torch.testing.assert_close(ours, value_and_gradients(eager, hidden, bands))


@WINGS
def test_compile_with_dynamic_shapes(name):
    """A new number of tokens needs no new graph."""
    torch._dynamo.reset()
    bands = problem("three")[2]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def eager(h, t):
        return run(h, t, bands, name)

    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    graphs = []  # 2 after the first call: for a plain float the compiler starts again
    for tokens in (11, 23, 130):  # none of them a size of the tables: those would be taken for equal
        hidden, targets, _ = problem("three", tokens)
        torch.testing.assert_close(compiled(hidden, targets), eager(hidden, targets))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], graphs


@WINGS
def test_autocast(name):
    only_cpu(name)
    hidden, targets, bands = problem("tiles", 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = value_and_gradients(lambda h, b: run(h, targets, b, name), hidden, bands)
        mixed = run(hidden.bfloat16(), targets, bands, name)
    assert [t.dtype for t in out] == [torch.float32] * len(out)
    half = run(hidden.bfloat16(), targets, bands.to(torch.bfloat16), name)
    assert torch.equal(out[0], half)
    assert torch.equal(mixed, half)


@WINGS
def test_second_order_is_refused(name):
    hidden, targets, bands = problem()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(run(hidden, targets, bands, name), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


@WINGS
def test_a_frozen_table_gets_no_gradient(name):
    hidden, targets, bands = problem()
    bands.tables[1].requires_grad_()
    run(hidden, targets, bands, name).backward()
    assert bands.tables[1].grad is not None
    assert hidden.grad is None
    assert bands.tables[0].grad is None


# ---- bad input ----------------------------------------------------------------------------------------------


def change(index, value):
    def apply(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return apply


BAD = {
    "target past the vocabulary": ("targets", change(4, 52), IndexError, r"\[0, 52\).*got 52 at position \[4\]"),
    "target below": ("targets", change(2, -7), IndexError, r"got -7 at position \[2\]"),
    "targets of another shape": ("targets", lambda t: t[:3], ValueError, r"targets must have the shape"),
    "targets of floats": ("targets", lambda t: t.float(), TypeError, "targets must be int64"),
    "targets no tensor": ("targets", lambda t: t.tolist(), TypeError, "targets must be an int64 tensor"),
    "hidden of another width": ("hidden", lambda t: t[:, :5], ValueError, r"with D = 16"),
    "hidden of another dtype": ("hidden", lambda t: t.double(), TypeError, "hidden must have the tables' dtype"),
    "hidden of integers": ("hidden", lambda t: t.long(), TypeError, "hidden must be float32"),
    "hidden no tensor": ("hidden", lambda t: None, TypeError, "hidden must be a tensor"),
    "tables and map of two sizes": ("token_row", lambda t: t[:-1], ValueError, "one length V"),
    "a row too many": ("tables", lambda t: [*t[:2], torch.cat([t[2], t[2]])], ValueError, "one row for each"),
    "a row shared": ("token_row", lambda t: torch.zeros_like(t), ValueError, "a row of its own"),
    "weight of another size": ("weight", lambda t: torch.ones(3), ValueError, r"weight must have shape \[V\]"),
    "weight of integers": ("weight", lambda t: torch.ones(52).int(), TypeError, "weight must be a tensor of floats"),
    "unknown reduction": ("reduction", lambda t: "median", ValueError, "'mean', 'sum', 'none'"),
    "smoothing past one": ("label_smoothing", lambda t: 1.5, ValueError, "from 0 to 1, got 1.5"),
    "smoothing no number": ("label_smoothing", lambda t: "much", TypeError, "label_smoothing must be a number"),
    "negative z_loss": ("z_loss", lambda t: -1.0, ValueError, "z_loss must be finite and at least 0"),
    "ignore_index a float": ("ignore_index", lambda t: 0.5, TypeError, "ignore_index must be an int"),
    "unknown backend": ("backend", lambda t: "abacus", ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    hidden, targets, bands = problem("three", 7, ignored=False)
    arguments = {"hidden": hidden, "targets": targets, **vars(bands), "backend": "reference"}
    argument, wrong, error, message = BAD[case]
    arguments[argument] = wrong(arguments.get(argument))
    with pytest.raises(error, match=message):
        sparse_attn.variable_width_cross_entropy(**arguments)


@NATIVE
def test_the_kernel_itself_reads_nothing_out_of_bounds():
    """A direct call of the op, past the checks in Python."""
    hidden, targets, bands = problem("three", 7, ignored=False)
    projections = [torch.empty(0, 0) if p is None else p for p in bands.projections]
    op = overload("variable_width_cross_entropy", "cpu")

    def call(targets=targets, row=bands.token_row, tables=bands.tables):
        return op(hidden, targets, tables, projections, bands.token_band, row, None, -100, 0.0)

    call()
    with pytest.raises(RuntimeError):
        call(targets=targets + 52)
    with pytest.raises(RuntimeError):
        call(row=bands.token_row + 50)
    with pytest.raises(RuntimeError):
        call(row=torch.zeros_like(bands.token_row))
    with pytest.raises(RuntimeError):
        call(tables=bands.tables[:2])
    for smoothing in (-0.5, 1.5, torch.nan):
        with pytest.raises(RuntimeError, match="label_smoothing must be from 0 to 1"):
            op(
                hidden,
                targets,
                bands.tables,
                projections,
                bands.token_band,
                bands.token_row,
                None,
                -100,
                smoothing,
            )
