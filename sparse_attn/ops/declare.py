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
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparse_attn import rule as rules
from sparse_attn.wings import base

library = torch.library.Library(base.NAMESPACE, "DEF")

_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")
_WITHOUT_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in _AUTOCAST_KEYS[1:]:
    _WITHOUT_AUTOCAST = _WITHOUT_AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


class Backward:
    """What a gradient formula works from.

    `saved` and `grads` are namespaces: arguments and results of the forward by name, and the gradients of its results
    (None where there is none); `needs[name]` says whether an argument's gradient is wanted (a list for a list).
    """

    def __init__(self, wing: str, saved: SimpleNamespace, grads: SimpleNamespace, needs: dict[str, Any]):
        self.wing, self.saved, self.grads, self.needs = wing, saved, grads, needs


class Op:
    """One op: `name` and `schema` (`(arguments) -> results`, without defaults), its fake and its gradient.

    `fake` and the wings' Python functions take the schema's arguments by position. `saved` names the arguments and
    results that `backward(Backward) -> {argument: gradient}` needs; `constant` names results without a gradient.
    An op that is itself a gradient says of what: `gradient_of="attention"`; then a second derivative is refused, in
    that word. An op without either is not differentiated.
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
    ) -> None:
        self.name, self.schema = name, schema
        parsed = torch._C.parse_schema(f"{base.NAMESPACE}::{name}{schema}")
        self.arguments = [a.name for a in parsed.arguments]
        self.results = [r.name for r in parsed.returns]
        kinds = {a.name: str(a.type) for a in [*parsed.arguments, *parsed.returns]}
        self._saved = [(n, kinds[n]) for n in saved.split()]
        self._lists = [n for n in self.arguments if kinds[n].startswith("List[Tensor")]
        self._constant, self._gradient = constant.split(), backward
        self._rule_at = self.arguments.index("attn_mask") if "rule" in self.arguments else None
        self._overloads: dict[str, Callable] = {}
        for wing in base.wings():
            if name in wing.implementations:
                self._define(wing, fake)
                if backward is not None:
                    self._differentiate(wing, self._setup_context, self._formula(wing.name))
                elif gradient_of is not None:
                    self._differentiate(wing, lambda ctx, inputs, output: None, _refuse(gradient_of))

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
        return base.choose(self.name, tensor, backend, function or self.name, rule, **(sizes or {}))

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
        torch.library.register_fake(f"{base.NAMESPACE}::{label}", self._with_rule(fake), lib=library)
        overload = getattr(getattr(getattr(torch.ops, base.NAMESPACE), self.name), wing.name)
        self._overloads[wing.name] = overload
        for key in _AUTOCAST_KEYS:
            library.impl(label, _without_autocast(overload), key)

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

    def _differentiate(self, wing: base.Wing, setup_context: Callable, formula: Callable) -> None:
        torch.library.register_autograd(
            f"{base.NAMESPACE}::{self.name}.{wing.name}", formula, setup_context=setup_context, lib=library
        )

    def _setup_context(self, ctx, inputs, output) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = dict(zip((*self.arguments, *self.results), (*inputs, *results), strict=True))
        tensors: list[Tensor | None] = []
        ctx.others, ctx.lists = {}, {name: len(values[name]) for name in self._lists}
        for name, kind in self._saved:
            if "Tensor" not in kind:
                ctx.others[name] = values[name]
            elif name in ctx.lists:
                tensors.extend(values[name])
            else:
                tensors.append(values[name])
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(values[name] for name in self._constant))
        ctx.set_materialize_grads(False)

    def _unsaved(self, ctx) -> SimpleNamespace:
        tensors = iter(ctx.saved_tensors)
        saved = SimpleNamespace(**ctx.others)
        for name, kind in self._saved:
            if name in ctx.lists:
                setattr(saved, name, [next(tensors) for _ in range(ctx.lists[name])])
            elif "Tensor" in kind:
                setattr(saved, name, next(tensors))
        return saved

    def _formula(self, wing: str) -> Callable:
        def formula(ctx, *grads):
            found: dict[str, Any] = {}
            if self._gradient is not None and any(g is not None for g in grads):
                needs = dict(zip(self.arguments, ctx.needs_input_grad, strict=True))
                named = SimpleNamespace(**dict(zip(self.results, grads, strict=True)))
                found = self._gradient(Backward(wing, self._unsaved(ctx), named, needs))
            nothing = {name: [None] * length for name, length in ctx.lists.items()}
            return tuple(found.get(name, nothing.get(name)) for name in self.arguments)

        return formula


def _without_autocast(overload: Callable) -> Callable:
    """The op with autocast off inside: its own matrix products would lose their float32 accumulation otherwise."""

    def kernel(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(_WITHOUT_AUTOCAST):
            return overload(*arguments)

    return kernel


def _refuse(what: str) -> Callable:
    def formula(ctx, *grads: Sequence[Tensor | None]):
        raise RuntimeError(
            f"sparse_attn: {what} has first-order gradients only; "
            "a second derivative (create_graph=True, then backward) was asked for"
        )

    return formula
