"""The ops under torch.func and in forward mode: derivatives, vmap, compiled too, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import bands as helper
from helpers.inputs import normal, qkv
from helpers.wings import overload
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sparse_attn
from sparse_attn.selection import Rule, Selection, attend

SAMPLES = 3
CASES = ("gathered_attention", "topk_attention", "block_attention", "embedding", "cross_entropy")


@dataclass
class Case:
    """An op as a function of its smooth inputs alone, and the same in plain PyTorch."""

    call: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]

    def directions(self, seed: int) -> tuple[Tensor, ...]:
        return tuple(normal(*x.shape, seed=seed + i).to(x) for i, x in enumerate(self.inputs))

    def samples(self) -> tuple[Tensor, ...]:
        """Inputs for a vmap, each a little different: what the selection was made for stays what it is."""
        return tuple(torch.stack([x * (1 + 0.1 * i) for i in range(SAMPLES)]) for x in self.inputs)


def weights(result: Tensor) -> Tensor:
    """Different ones for all elements, without a random number, which vmap refuses."""
    return torch.arange(1.0, result.numel() + 1, device=result.device).cos().view(result.shape)


def loss_of(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A scalar that weighs every element of every result."""
    return lambda *inputs: sum((weights(r) * r).sum() for r in function(*inputs))


def case_of(name: str, wing, dtype: torch.dtype = torch.float32) -> Case:
    if name in ("embedding", "cross_entropy"):
        return _of_bands(name, wing, dtype)
    inputs = tuple(t.to(wing.device) for t in qkv(2, 4, 2, 5, 6, 4, 3, dtype=dtype))
    options = {"return_lse": True, "backend": wing.name}
    lengths = torch.tensor([6, 4], device=wing.device)
    rule = {"share": "all", "key_lengths": lengths, "sinks": 1}
    if name == "block_attention":
        blocks = sparse_attn.block_select(*inputs[:2], 2, block_size=2, query_tile=2, backend=wing.name)
        places = (2 * blocks.unsqueeze(-1) + torch.arange(2, device=wing.device)).flatten(3)
        indices = places.repeat_interleave(2, dim=2)[:, :, :5]

        def call(*qkv):
            return attend(*qkv, Selection(blocks, 2, 2), rule=Rule(key_lengths=lengths), **options)
    elif name == "topk_attention":
        indices = sparse_attn.topk_select(*inputs[:2], 3, **rule, backend=wing.name)

        def call(*qkv):
            return sparse_attn.topk_attention(*qkv, 3, **rule, **options)
    else:
        indices = sparse_attn.topk_select(*inputs[:2], 3, share="kv", backend=wing.name)

        def call(*qkv):
            return sparse_attn.gathered_attention(*qkv, indices, **options)

    seen = torch.zeros(2, indices.shape[1], 5, 6, dtype=torch.bool, device=wing.device)
    seen = seen.scatter(3, indices.long(), True).repeat_interleave(4 // indices.shape[1], dim=1)
    if name == "block_attention":
        seen = seen & (torch.arange(6, device=wing.device) < lengths.view(2, 1, 1, 1))
    assert bool(seen.any(-1).all())

    def plain(query, key, value):
        key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
        scores = (query @ key.mT / 2).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ value, scores.logsumexp(-1).float()

    return Case(call, plain, inputs)


def _of_bands(name: str, wing, dtype: torch.dtype) -> Case:
    bands = helper.make(8, (3, 2, 4), (8, 4, 2)).to(dtype).to(wing.device)
    maps = bands.token_band, bands.token_row
    if name == "embedding":
        ids = torch.tensor([[3, 1, 8, 0], [3, 3, 5, 7]], device=wing.device)

        def call(*parameters):
            own = bands.with_parameters(parameters)
            return (
                sparse_attn.variable_width_embedding(
                    ids, own.tables, own.projections, *maps, padding_idx=1, backend=wing.name
                ),
            )

        def plain(*parameters):
            return (
                torch.where((ids == 1).unsqueeze(-1), 0.0, bands.with_parameters(parameters).dense()[ids]),
            )

        return Case(call, plain, tuple(bands.parameters))
    targets = torch.tensor([3, 1, -100, 8, 0], device=wing.device)
    hidden = normal(5, 8, dtype=dtype, seed=2).to(wing.device)
    options = {
        "weight": torch.linspace(0.5, 2.0, 9, dtype=dtype, device=wing.device),
        "label_smoothing": 0.1,
        "reduction": "none",
    }

    def call(hidden, *parameters):
        own = bands.with_parameters(parameters)
        return (
            sparse_attn.variable_width_cross_entropy(
                hidden, targets, own.tables, own.projections, *maps, backend=wing.name, **options
            ),
        )

    def plain(hidden, *parameters):
        return (F.cross_entropy(hidden @ bands.with_parameters(parameters).dense().t(), targets, **options),)

    return Case(call, plain, (hidden, *bands.parameters))


@pytest.fixture(params=CASES)
def case(request, wing) -> Case:
    return case_of(request.param, wing)


def same(ours, want) -> None:
    torch.testing.assert_close(tuple(ours), tuple(want), rtol=1e-5, atol=1e-5)


def every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs)))


def test_grad_and_vjp(case):
    want = grad(loss_of(case.plain), every(case))(*case.inputs)
    same(grad(loss_of(case.call), every(case))(*case.inputs), want)
    results, pull = vjp(case.call, *case.inputs)
    same(pull(tuple(weights(r) for r in results)), want)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    same(torch.autograd.grad(loss_of(case.call)(*leaves), leaves), want)


def test_per_sample_gradients(case):
    """Those of a loop: batched inputs, batched gradients."""
    samples, gradients = case.samples(), grad(loss_of(case.call), every(case))
    ours = vmap(gradients)(*samples)
    want = [gradients(*inputs) for inputs in zip(*samples, strict=True)]
    assert all(torch.equal(o, torch.stack(w)) for o, w in zip(ours, zip(*want, strict=True), strict=True))
    plain = vmap(grad(loss_of(case.plain), every(case)))(*samples)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_jacobians(case):
    want = jacrev(case.plain)(*case.inputs)
    same(jacrev(case.call)(*case.inputs), want)
    same(jacfwd(case.call)(*case.inputs), want)


def test_forward_mode(case):
    """Through the selected keys, whoever else wants a gradient: no input, some or all."""
    moves = case.directions(30)
    want = jvp(case.plain, case.inputs, moves)[1]
    same(jvp(case.call, case.inputs, moves)[1], want)
    for wanted in (False, True):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.clone().requires_grad_(wanted), m)
                     for x, m in zip(case.inputs, moves, strict=True)]  # fmt: skip
            same([forward_ad.unpack_dual(r).tangent for r in case.call(*duals)], want)
    for number in every(case):
        one = lambda f, x, n=number: f(*case.inputs[:n], x, *case.inputs[n + 1 :])  # noqa: E731
        ours, want = (
            jvp(partial(one, f), case.inputs[number : number + 1], moves[number : number + 1])[1]
            for f in (case.call, case.plain)
        )
        same(ours, want)


def test_reverse_over_forward(case):
    """A gradient of a tangent: Hessian-vector products; and a tangent of a tangent."""
    moves = case.directions(30)

    def along(function):
        return lambda *inputs: loss_of(lambda *x: jvp(function, x, moves)[1])(*inputs)

    ours, want = (grad(along(f), every(case))(*case.inputs) for f in (case.call, case.plain))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    ours, want = (
        jvp(lambda *x, f=f: jvp(f, x, moves)[1], case.inputs, moves)[1] for f in (case.call, case.plain)
    )
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_in_forward_mode(wing, dtype, name):
    case = case_of(name, wing, dtype)
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(
        lambda *x: case.call(*x)[0], leaves, check_forward_ad=True, fast_mode=True
    )


def test_tangents_of_the_overloads(wing):
    """torch.ops, with no function of ours before it: the tangent too, never a silent zero."""
    inputs = tuple(t.to(wing.device) for t in qkv(1, 2, 2, 4, 5, 3))
    indices = sparse_attn.topk_select(*inputs[:2], 2, backend=wing.name)
    moves = tuple(normal(*t.shape, seed=9).to(t) for t in inputs)
    op = overload("gathered_attention", wing.name)
    _, want = jvp(
        lambda *x: sparse_attn.gathered_attention(*x, indices, scale=1.0, backend=wing.name), inputs, moves
    )
    with forward_ad.dual_level():
        out, _ = op(
            *(forward_ad.make_dual(x, m) for x, m in zip(inputs, moves, strict=True)), indices, 1.0, 0.0, None
        )
        assert torch.equal(forward_ad.unpack_dual(out).tangent, want)
    assert bool(want.any())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(wing, name):
    case = case_of(name, wing)
    sentence = r"sparse_attn: \w+ has first-order gradients only; "
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    grads = torch.autograd.grad(loss_of(case.call)(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=sentence + "a second derivative"):
        sum(g.square().sum() for g in grads).backward()
    gradients = grad(loss_of(case.call), every(case))
    with pytest.raises(NotImplementedError, match=sentence + "a second derivative"):
        grad(lambda *x: sum(g.square().sum() for g in gradients(*x)))(*case.inputs)
    with pytest.raises(NotImplementedError, match=sentence + "forward mode over a gradient"):
        jvp(gradients, case.inputs, case.directions(3))
    with pytest.raises(NotImplementedError, match=sentence + "forward mode over a gradient"):
        hessian(loss_of(case.call))(*case.inputs)


@pytest.mark.parametrize("transform", ["grad", "per sample", "jvp"])
@pytest.mark.parametrize("name", ["topk_attention", "cross_entropy"])
def test_compiled(wing, name, transform):
    if wing.name == "reference" and transform != "grad":
        pytest.skip("what is compiled stands above the wings: the others have it")
    torch._dynamo.reset()
    case = case_of(name, wing)
    half = len(case.inputs)
    function, inputs = {
        "grad": (grad(loss_of(case.call), every(case)), case.inputs),
        "per sample": (vmap(grad(loss_of(case.call), every(case))), case.samples()),
        "jvp": (lambda *x: jvp(case.call, x[:half], x[half:])[1], case.inputs + case.directions(3)),
    }[transform]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    same(compiled(*inputs), function(*inputs))
