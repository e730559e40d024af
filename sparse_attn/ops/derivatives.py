"""How an op meets autograd and torch.func: one `torch.autograd.Function` per overload, made from its declaration.

It serves backward, forward mode and the transforms alike, and is reached through the dispatcher, so that the public
functions, `torch.ops.sparse_attn.*` and compiled graphs all have the same: the autograd key takes a call that wants a
gradient or a tangent, functorch's own key one inside `torch.func.grad`, `vmap` or `jvp`. Other calls pass it by;
those of this package pass the dispatcher's key of autograd by, too (`directly`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")
WITHOUT_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in AUTOCAST_KEYS[1:]:
    WITHOUT_AUTOCAST = WITHOUT_AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
_SAVED = object()  # in the place of a tensor that autograd keeps


class Backward:
    """What a gradient formula works from.

    `saved` and `grads` are namespaces: arguments and results of the forward by name, and the gradients of its results
    (None where there is none); `needs[name]` says whether an argument's gradient is wanted (a list for a list).
    """

    def __init__(self, wing: str, saved: SimpleNamespace, grads: SimpleNamespace, needs: dict[str, Any]):
        self.wing, self.saved, self.grads, self.needs = wing, saved, grads, needs


class Forward:
    """What a formula of forward mode works from, beside the arguments: the namespaces `tangents`, of the arguments
    (None where there is none, a list for a list), and `results`."""

    def __init__(self, wing: str, tangents: SimpleNamespace, results: SimpleNamespace):
        self.wing, self.tangents, self.results = wing, tangents, results


class _Call:
    """What autograd does not look at: the keys below which to go on, and how many leaves each list has."""

    __slots__ = ("keyset", "lengths", "results")

    def __init__(self, keyset: torch._C.DispatchKeySet | None, lengths: list[int]) -> None:
        self.keyset, self.lengths = keyset, lengths
        self.results: list[int] = []


class Leaves:
    """Names of an op's arguments or results; those that are lists of tensors stand singly among the leaves."""

    def __init__(self, values: Sequence[tuple[str, str]]) -> None:
        self.names = [name for name, _ in values]
        self.lists = [kind.startswith("List[Tensor") for _, kind in values]
        self.plain = not any(self.lists)

    def leaves(self, values: Sequence[Any]) -> tuple[Sequence[Any], list[int]]:
        if self.plain:
            return values, []
        leaves, lengths = [], []
        for value, listed in zip(values, self.lists, strict=True):
            if listed:
                leaves.extend(value)
                lengths.append(len(value))
            else:
                leaves.append(value)
        return leaves, lengths

    def values(self, leaves: Sequence[Any], lengths: Sequence[int]) -> Sequence[Any]:
        if self.plain:
            return leaves
        rest, counts = iter(leaves), iter(lengths)
        return [[next(rest) for _ in range(next(counts))] if listed else next(rest) for listed in self.lists]


class Declaration(Protocol):
    """What is asked of an op (`declare.Op`)."""

    name: str
    inputs: Leaves
    outputs: Leaves
    differentiable: bool
    constant: list[str]
    gradient_of: str | None
    backward: Callable[[Backward], dict[str, Any]] | None
    tangent: Callable[..., dict[str, Tensor]] | None
    batch: frozenset[str]

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]: ...

    def save(self, ctx: Any, values: dict[str, Any]) -> None: ...

    def saved(self, ctx: Any) -> SimpleNamespace: ...


def connect(op: Declaration, wing: str, overload: Any, implement: Callable) -> None:
    """Registers what one overload does about derivatives and transforms: `implement(kernel, key, **options)`."""
    ordinary, transformable = _functions(op, wing, overload)

    def apply(keyset: Any, arguments: Sequence[Any]) -> Any:
        leaves, lengths = op.inputs.leaves(arguments)
        call = _Call(keyset, lengths)
        found = (transformable if keyset is None else ordinary).apply(call, *leaves)
        return found if op.outputs.plain else tuple(op.outputs.values(found, call.results))

    def transformed(*arguments: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() == TransformType.Functionalize:  # which has no rule for a Function
            return _functionalized(overload, interpreter, arguments)
        return apply(None, arguments)

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if _wanted(arguments):
            return apply(keyset, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def batched(*arguments: Any) -> Any:
        raise NotImplementedError(
            f"sparse_attn: {op.name} does not take is_grads_batched=True or vectorize=True of torch.autograd; "
            "torch.func.vmap, jacrev and jacfwd do the same"
        )

    implement(transformed, "FuncTorchDynamicLayerFrontMode")
    if not (op.inputs.plain and op.outputs.plain):
        implement(batched, "Batched")  # where there are lists torch's own loop would not do
    if op.differentiable:
        implement(autograd, "Autograd", with_keyset=True)


def _wanted(arguments: Sequence[Any]) -> bool:
    """Whether autograd has something to do: a gradient, or a tangent."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return True
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def derivatives_wanted(arguments: Sequence[Any]) -> bool:
    """Whether a call may be differentiated: by autograd, in a graph that is compiled, under torch.func."""
    return is_dynamo_compiling() or torch._C._are_functorch_transforms_active() or _wanted(arguments)


def only_backward_wanted(arguments: Sequence[Any]) -> bool:
    """Whether of all derivatives autograd's reverse mode alone is wanted, outside of compiled graphs."""
    others = is_dynamo_compiling() or torch._C._are_functorch_transforms_active()
    return not others and forward_ad._current_level < 0 and _wanted(arguments)


def directly(overload: Any) -> Callable:
    """The op as this package calls it: autograd's key, which is Python, costs a small call a fifth of its time."""

    def call(*arguments: Any) -> Any:
        if derivatives_wanted(arguments):
            return overload(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    return call


def _functions(op: Declaration, wing: str, overload: Any) -> tuple[type[torch.autograd.Function], ...]:
    """One for calls outside torch.func, and the same in the form that torch.func needs, which takes 10 µs longer."""
    inputs, outputs = op.inputs, op.outputs
    names = (*inputs.names, *outputs.names)

    def forward(call: _Call, *leaves: Any) -> Any:
        arguments = inputs.values(leaves, call.lengths)
        with torch._C._AutoDispatchBelowAutograd():
            if call.keyset is None:
                found = overload(*arguments)
            else:
                found = overload.redispatch(call.keyset & torch._C._after_autograd_keyset, *arguments)
        return _flat(outputs, call, found)

    def setup_context(ctx: Any, arguments: tuple, output: Any) -> None:
        call, leaves = arguments[0], arguments[1:]
        results = output if isinstance(output, tuple) else (output,)
        given, found = inputs.values(leaves, call.lengths), outputs.values(results, call.results)
        named = dict(zip(names, (*given, *found), strict=True))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(named[name] for name in op.constant))
        op.save(ctx, named)
        if forward_ad._current_level >= 0 or _inside_jvp():
            ctx.given = [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in (*leaves, *results)]
            ctx.save_for_forward(*(leaf for leaf in (*leaves, *results) if isinstance(leaf, Tensor)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if op.gradient_of is not None:
            _refuse(op.gradient_of, "a second derivative (create_graph=True, then backward) was asked for")
        call: _Call = ctx.call
        found: dict[str, Any] = {}
        if op.backward is not None and any(grad is not None for grad in grads):
            needs = dict(
                zip(inputs.names, inputs.values(ctx.needs_input_grad[1:], call.lengths), strict=True)
            )
            named = dict(zip(outputs.names, outputs.values(grads, call.results), strict=True))
            found = op.backward(Backward(wing, op.saved(ctx), SimpleNamespace(**named), needs))
        if inputs.plain:
            return (None, *map(found.get, inputs.names))
        lengths = iter(call.lengths)
        nothing = ([None] * next(lengths) if listed else None for listed in inputs.lists)
        leaves, _ = inputs.leaves([found.get(n, none) for n, none in zip(inputs.names, nothing, strict=True)])
        return (None, *leaves)

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        if op.gradient_of is not None:
            _refuse(op.gradient_of, "forward mode over a gradient was asked for")
        if not op.differentiable:
            return None if len(outputs.names) == 1 else (None,) * len(outputs.names)
        if op.tangent is None:
            raise NotImplementedError(
                f"sparse_attn: {op.name} has no forward mode (torch.func.jvp, torch.autograd.forward_ad), "
                "only reverse mode (backward, torch.func.vjp)"
            )
        # Without their tangents of this level: what the formula does must not be differentiated once more.
        saved = (forward_ad.unpack_dual(tensor, level=0).primal for tensor in ctx.saved_tensors)
        given = [next(saved) if leaf is _SAVED else leaf for leaf in ctx.given]
        lengths, count = ctx.call.lengths, len(tangents)
        results = dict(zip(outputs.names, outputs.values(given[count:], ctx.call.results), strict=True))
        moves = dict(zip(inputs.names, inputs.values(tangents, lengths), strict=True))
        call = Forward(wing, SimpleNamespace(**moves), SimpleNamespace(**results))
        with torch._C._ExcludeDispatchKeyGuard(WITHOUT_AUTOCAST), forward_ad._set_fwd_grad_enabled(True):
            found = op.tangent(call, **op.named(inputs.values(given[:count], lengths)))
        along = tuple(found.get(name) for name in outputs.names)
        return along if len(along) > 1 else along[0]

    def vmap(info: Any, in_dims: tuple, call: _Call, *leaves: Any) -> tuple[Any, int]:
        arguments = inputs.values(leaves, call.lengths)
        dims = inputs.values(in_dims[1:], call.lengths)
        return _flat(outputs, call, _over_batch(op, overload, info.batch_size, arguments, dims)), 0

    def forward_with_context(ctx: Any, call: _Call, *leaves: Any) -> Any:
        found = forward(call, *leaves)
        setup_context(ctx, (call, *leaves), found)
        return found

    shared = {"backward": staticmethod(backward), "jvp": staticmethod(jvp)}
    forms: tuple[dict[str, Any], ...] = (
        {"forward": staticmethod(forward_with_context)},
        {f.__name__: staticmethod(f) for f in (forward, setup_context, vmap)},
    )
    return tuple(type(f"{op.name}_{wing}", (torch.autograd.Function,), shared | form) for form in forms)


def _flat(outputs: Leaves, call: _Call, results: Any) -> Any:
    """The results as leaves, one tensor or a tuple of them; the call keeps how many there are of each list."""
    if outputs.plain:
        return results
    leaves, call.results = outputs.leaves(results)
    return tuple(leaves)


def _inside_jvp() -> bool:
    """Whether the innermost transform is forward mode: in a compiled graph torch counts no level."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return retrieve_current_functorch_interpreter().key() == TransformType.Jvp


def _functionalized(overload: Any, interpreter: Any, arguments: Sequence[Any]) -> Any:
    functional = FunctorchFunctionalizeAPI(interpreter)
    with functional.redispatch_to_next():
        found = overload(*functional.unwrap_tensors(tuple(arguments)))
    return functional.wrap_tensors(found)


def _refuse(what: str, asked: str) -> NoReturn:
    raise NotImplementedError(
        f"sparse_attn: {what} has first-order gradients only; {asked} (docs/torch_func.md)"
    )


def _over_batch(
    op: Declaration, overload: Any, size: int, arguments: Sequence[Any], dims: Sequence[Any]
) -> Any:
    """The op for each entry of vmap's own dimension, which becomes the results' first one."""
    moved = [_first(value, dim) for value, dim in zip(arguments, dims, strict=True)]
    batched = [any(d is not None for d in dim) if isinstance(dim, list) else dim is not None for dim in dims]
    names = [name for name, mapped in zip(op.inputs.names, batched, strict=True) if mapped]
    if not op.batch.issuperset((*names, *op.outputs.names)):
        return _one_by_one(op, overload, size, moved, dims)

    rows = None  # the batch size of one entry; a tensor without any dimension has none
    for at, (name, value) in enumerate(zip(op.inputs.names, moved, strict=True)):
        if name in op.batch and value is not None:
            value = value if batched[at] else value.expand(size, *value.shape)
            if value.dim() > 1:
                rows = value.shape[1]
                value = value.flatten(0, 1)
            moved[at] = value
    found = overload(*moved)
    if rows is None:
        return found
    if isinstance(found, Tensor):
        return found.unflatten(0, (size, rows))
    return tuple(result.unflatten(0, (size, rows)) for result in found)


def _first(value: Any, dim: Any) -> Any:
    """The value with vmap's dimension in front, where it has one."""
    if isinstance(dim, list):
        return [_first(v, d) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.movedim(dim, 0)


def _one_by_one(
    op: Declaration, overload: Any, size: int, arguments: Sequence[Any], dims: Sequence[Any]
) -> Any:
    """For what is summed over the batch, or where more is mapped than what has a batch dimension."""

    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list):
            return [entry(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value[i]

    if size == 0:
        raise NotImplementedError(
            f"sparse_attn: {op.name} is called once per entry of this vmap, and there is none"
        )
    found = [
        overload(*(entry(value, dim, i) for value, dim in zip(arguments, dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple(
        [torch.stack(entries) for entries in zip(*results, strict=True)] if listed else torch.stack(results)
        for results, listed in zip(zip(*found, strict=True), op.outputs.lists, strict=True)
    )
