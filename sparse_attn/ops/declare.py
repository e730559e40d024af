"""How an op becomes a `torch.library` op: one declaration gives schema, fake, gradient and refusals to every wing.

    OP = Op("scaled", "(Tensor rows, float factor) -> Tensor out", fake, saved="rows factor", backward=backward)
    OP.on(OP.choose(rows, backend))(rows, factor)

There is one overload per wing that has the op: `torch.ops.sparse_attn.scaled.cpu`. Names and positions come from the
schema, so a formula speaks of arguments by name. Where the schema carries the rule (rule.py), Python code gets it as
one `PackedRule` in the place of its parts. Schemas of the compiled wings are known from C++ too, for programs without
Python; an overload that is there already is taken as it is, if it has this schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparse_attn import rule as rules
from sparse_attn.ops.derivatives import (
    AUTOCAST_KEYS,
    WITHOUT_AUTOCAST,
    Backward,
    Forward,
    Leaves,
    connect,
    directly,
)
from sparse_attn.wings import base

__all__ = ["Backward", "Forward", "Op"]

library = torch.library.Library(base.NAMESPACE, "DEF")


class Op:
    """One op: `name` and `schema` (`(arguments) -> results`, without defaults), its fake and its gradient.

    `fake` and the wings' Python functions take the schema's arguments by position. `saved` names the arguments and
    results that `backward(Backward) -> {argument: gradient}` needs; `constant` names results without a gradient.
    An op that is itself a gradient says of what: `gradient_of="attention"`; then a second derivative is refused, in
    that word. An op without either is not differentiated, and its results are constants.

    `tangent(Forward, **arguments) -> {result: tangent}` is forward mode: it takes every argument of the schema by
    name, the rule as one, so that none is overlooked. Without it forward mode is refused.
    `batch` names the tensors, arguments and results, whose first dimension is the batch (the rule says its own):
    `vmap` folds its own dimension into it. `shared` names the other tensors among the arguments; a `vmap` over them,
    and one of a result that is summed over the batch, calls the op once per entry, as it does without any `batch`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable,
        *,
        saved: str = "",
        constant: str = "",
        backward: Callable[[Backward], dict[str, Any]] | None = None,
        gradient_of: str | None = None,
        tangent: Callable[..., dict[str, Tensor]] | None = None,
        batch: str = "",
        shared: str = "",
    ) -> None:
        self.name, self.schema = name, schema
        parsed = torch._C.parse_schema(f"{base.NAMESPACE}::{name}{schema}")
        arguments, results = (
            [(v.name or "out", str(v.type)) for v in values] for values in (parsed.arguments, parsed.returns)
        )
        self.inputs, self.outputs = Leaves(arguments), Leaves(results)
        kinds = dict((*arguments, *results))
        self._saved = [(n, kinds[n]) for n in saved.split()]
        self.backward, self.gradient_of, self.tangent = backward, gradient_of, tangent
        self.differentiable = backward is not None or gradient_of is not None
        self.constant = constant.split() if self.differentiable else self.outputs.names
        self._rule_at = self.inputs.names.index("attn_mask") if "rule" in kinds else None
        if batch and self._rule_at is not None:
            batch, shared = f"{batch} {rules.BATCH}", f"{shared} {rules.SHARED}"
        self.batch = frozenset(batch.split())
        if batch:
            tensors = {n for n in self.inputs.names if "Tensor" in kinds[n]}
            unsaid = tensors ^ self.batch.union(shared.split()).difference(self.outputs.names)
            assert not unsaid, f"{name}: is {unsaid} in `batch` or in `shared`?"
        self._overloads: dict[str, Callable] = {}
        for wing in base.wings():
            if name in wing.implementations:
                self._define(wing, fake)

    def choose(
        self,
        tensor: Tensor,
        backend: str | None,
        *,
        rule: rules.Rule | None = None,
        function: str | None = None,
        sizes: dict[str, int] | None = None,
    ) -> str:
        """The wing for such a call (`base.choose`); `function` is the public name where it is not the op's."""
        return base.choose(self.name, tensor, backend, function or self.name, rule, sizes or base.NO_SIZES)

    def has(self, wing: str) -> bool:
        """Whether that wing has this op."""
        return wing in self._overloads

    def on(self, wing: str) -> Callable:
        """`torch.ops.sparse_attn.<op>.<wing>`."""
        return self._overloads[wing]

    def _define(self, wing: base.Wing, fake: Callable) -> None:
        label = f"{self.name}.{wing.name}"
        packet = getattr(getattr(torch.ops, base.NAMESPACE), self.name, None)
        there = getattr(packet, wing.name, None)
        if there is None:
            library.define(label + self.schema)
        elif str(there._schema) != str(torch._C.parse_schema(f"{base.NAMESPACE}::{label}{self.schema}")):
            raise ImportError(
                f"the compiled extension has {there._schema}, this Python package {label}{self.schema}: "
                "they are of different versions; reinstall sparse_attn"
            )
        implementation = wing.implementations[self.name]
        if implementation is not None:
            library.impl(label, self._with_rule(implementation), wing.dispatch_key)
        checked = _on_one_device(label, self._with_rule(fake))
        torch.library.register_fake(f"{base.NAMESPACE}::{label}", checked, lib=library)
        overload = getattr(getattr(getattr(torch.ops, base.NAMESPACE), self.name), wing.name)
        self._overloads[wing.name] = directly(overload) if self.differentiable else overload
        for key in AUTOCAST_KEYS:
            library.impl(label, _without_autocast(overload), key)
        connect(self, wing.name, overload, partial(library.impl, label))

    def _with_rule(self, function: Callable) -> Callable:
        """`function` takes the rule as one argument."""
        at = self._rule_at
        if at is None:
            return function
        end = at + rules.PARTS

        def call(*arguments):
            rule = rules.PackedRule.of_parts(*arguments[at:end])
            return function(*arguments[:at], rule, *arguments[end:])

        return call

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """Arguments in the schema's order by name, the rule as one."""
        found = dict(zip(self.inputs.names, arguments, strict=True))
        if self._rule_at is not None:
            names = self.inputs.names[self._rule_at : self._rule_at + rules.PARTS]
            found["rule"] = rules.PackedRule.of_parts(*(found.pop(name) for name in names))
        return found

    def save(self, ctx: Any, values: dict[str, Any]) -> None:
        """What the gradient formula needs."""
        tensors: list[Tensor | None] = []
        ctx.others = {}
        for name, kind in self._saved:
            if "Tensor" not in kind:
                ctx.others[name] = values[name]
            elif isinstance(values[name], (list, tuple)):
                ctx.others[name] = len(values[name])
                tensors.extend(values[name])
            else:
                tensors.append(values[name])
        ctx.save_for_backward(*tensors)

    def saved(self, ctx: Any) -> SimpleNamespace:
        tensors = iter(ctx.saved_tensors)
        saved = SimpleNamespace(**ctx.others)
        for name, kind in self._saved:
            if name in ctx.others and "Tensor" in kind:
                setattr(saved, name, [next(tensors) for _ in range(ctx.others[name])])
            elif "Tensor" in kind:
                setattr(saved, name, next(tensors))
        return saved


def _on_one_device(label: str, fake: Callable) -> Callable:
    """The fake, which torch also calls for meta tensors among others: it would give them results without a value."""

    def call(*arguments):
        devices = {str(t.device) for t in tree_leaves(arguments) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{label} takes tensors of one device, got some on {' and '.join(sorted(devices))}"
            )
        return fake(*arguments)

    return call


def _without_autocast(overload: Callable) -> Callable:
    """The op with autocast off inside: its own matrix products would lose their float32 accumulation otherwise."""

    def kernel(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(WITHOUT_AUTOCAST):
            return overload(*arguments)

    return kernel
