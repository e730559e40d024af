"""The one dispatcher: which wing (backend) runs an op, and why the others do not.

A wing is one implementation of the ops. Each wing is one overload of each op that it has: the op `topk_select`
of the wing `cpu` is `torch.ops.sparse_attn.topk_select.cpu`. The choice is made once per call from device and
dtype, and the autograd formula of an overload calls the backward of the same wing, so a forced wing serves
gradients too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from sparse_attn.rule import Rule

NAMESPACE = "sparse_attn"


@dataclass(frozen=True)
class Wing:
    """One backend.

    `implementations` maps an op's name to its Python function, or to None where C++ registers the kernel.
    `why_not(op, device_type, dtype)` is None where the wing takes such a call, else the reason in one clause.
    `limits` are the largest sizes that it takes, by the names that the ops give to `choose` (head_dim, …); of an
    option that it does not have, 0. `rule` names the parts of the rule that its kernels know; None: all.
    A wing that is `by_name_only` runs only when a call or `use_backend` names it.
    """

    name: str
    dispatch_key: str
    implementations: dict[str, Callable | None]
    why_not: Callable[[str, str, torch.dtype], str | None]
    limits: dict[str, int] = field(default_factory=dict)
    rule: frozenset[str] | None = None
    by_name_only: bool = False

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule.issuperset(part.name for part in fields(Rule)):
            object.__setattr__(self, "rule", None)  # so that calls need not ask what the rule says

    def refusal(
        self,
        op: str,
        device_type: str,
        dtype: torch.dtype,
        sizes: dict[str, int],
        rule: Rule | None = None,
    ) -> str | None:
        """None where the wing takes the call, else why not in one clause."""
        if op not in self.implementations:
            # A wing without any op is not there, and knows why.
            absent = None if self.implementations else self.why_not(op, device_type, dtype)
            return absent or f"it has no {op}"
        reason = self.why_not(op, device_type, dtype)
        if reason is not None:
            return reason
        for name, limit in self.limits.items():
            if name in sizes and sizes[name] > limit:
                if limit == 0:
                    return f"it has no {name.replace('_', ' ')}"
                return f"it takes {name} up to {limit}, got {sizes[name]}"
        if self.rule is not None and rule is not None:
            unknown = rule.said() - self.rule
            if unknown:
                return f"it has no {' and '.join(sorted(unknown))}"
        return None


@dataclass
class _State:
    wings: dict[str, Wing] = field(default_factory=dict)  # in order of preference
    # A plain global, not a ContextVar: autograd's own threads do not see the latter.
    forced: str | None = None
    warned: set[str] = field(default_factory=set)
    explaining: set[int] = field(default_factory=set)  # threads inside explain_call


_state = _State()


def register(wing: Wing) -> None:
    """Adds a wing; the first registered is the most preferred."""
    _state.wings[wing.name] = wing


def wings() -> tuple[Wing, ...]:
    """All wings, the most preferred first."""
    return tuple(_state.wings.values())


def _check_name(name: object) -> str:
    if not isinstance(name, str) or name not in _state.wings:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _state.wings))} or None, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one wing for every call inside the `with` block, in all threads.

    Args:
        name: "cpu", "cuda", "triton" or "reference". A call that the wing cannot take raises ValueError instead of
            falling back. None leaves the choice to the package again, inside another such block.

    Raises:
        ValueError: no wing has that name.

    Example:
        >>> import torch, sparse_attn
        >>> q = torch.randn(1, 2, 8, 16)
        >>> with sparse_attn.use_backend("reference"):
        ...     out = sparse_attn.topk_attention(q, q, q, 4, is_causal=True)
    """
    if name is not None:
        _check_name(name)
    previous, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = previous


def reasons(
    op: str, device_type: str, dtype: torch.dtype, rule: Rule | None = None, **sizes: int
) -> dict[str, str | None]:
    """For each wing None if it takes the call, else why not."""
    return {w.name: w.refusal(op, device_type, dtype, sizes, rule) for w in _state.wings.values()}


def choose(
    op: str,
    tensor: Tensor,
    backend: str | None,
    function: str | None = None,
    rule: Rule | None = None,
    **sizes: int,
) -> str:
    """The name of the wing that runs `op` on such tensors; `backend` (or `use_backend`) forces one.

    `sizes` are those that some wing limits, `function` is the name that the caller knows.
    """
    device_type, dtype = tensor.device.type, tensor.dtype
    forced = backend if backend is not None else _state.forced
    chosen = None
    if forced is not None:
        reason = _state.wings[_check_name(forced)].refusal(op, device_type, dtype, sizes, rule)
        if reason is not None:
            raise ValueError(f"backend={forced!r} cannot run {function or op} here: {reason}")
        chosen = forced
    else:
        for wing in _state.wings.values():
            if not wing.by_name_only and wing.refusal(op, device_type, dtype, sizes, rule) is None:
                chosen = wing.name
                break
    if chosen is None:
        why = reasons(op, device_type, dtype, rule, **sizes)
        raise ValueError(f"no backend runs {function or op} on {device_type} with {dtype}: {why}")
    # Of this thread alone; a graph that is being compiled finds nobody asking.
    if _state.explaining and threading.get_ident() in _state.explaining:
        raise _Explained(Explanation(function or op, chosen, reasons(op, device_type, dtype, rule, **sizes)))
    if chosen == "reference" and forced is None and device_type not in ("cpu", "meta"):
        _warn_reference(op, device_type, dtype, sizes, rule)
    return chosen


@dataclass(frozen=True)
class Explanation:
    """Which wing a call would run on, and for each other wing why not; `print` it."""

    op: str
    backend: str
    reasons: dict[str, str | None]  # None: it could take the call

    def __str__(self) -> str:
        lines = [f"{self.op} runs on the {self.backend!r} wing"]
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {reason or 'it could, but is less preferred'}")
        return "\n".join(lines)


class _Explained(Exception):
    """Ends a call that was to be explained, before its first op runs."""


def explain_call(function: Callable, *arguments: Any, **options: Any) -> Explanation:
    """Says which wing a call would run on, and why not on each other one; the op itself does not run.

    Args:
        function: a function of this package, such as :func:`sparse_attn.gathered_attention`; of one that calls
            several ops, the first is explained.
        arguments, options: what it would be called with. What it would raise is raised.

    Raises:
        TypeError: the function calls no op.

    Example:
        >>> import torch, sparse_attn
        >>> q = torch.randn(1, 2, 8, 16, dtype=torch.float64)
        >>> print(sparse_attn.explain_call(sparse_attn.topk_select, q, q, 4).backend)
        reference
    """
    if not callable(function):
        raise TypeError(f"explain_call takes a function that calls an op of sparse_attn, got {function!r}")
    thread = threading.get_ident()
    _state.explaining.add(thread)
    try:
        function(*arguments, **options)
    except _Explained as end:
        return end.args[0]
    finally:
        _state.explaining.discard(thread)
    raise TypeError(f"explain_call takes a function that calls an op of sparse_attn, got {function!r}")


def _warn_reference(
    op: str, device_type: str, dtype: torch.dtype, sizes: dict[str, int], rule: Rule | None
) -> None:
    """No silent fallback: on an accelerator the slow path says so, once per op and device type."""
    label = f"{op} on {device_type}"
    if torch.compiler.is_compiling() or label in _state.warned:
        return
    _state.warned.add(label)
    refusals = reasons(op, device_type, dtype, rule, **sizes)
    why = "; ".join(f"{n}: {r}" for n, r in refusals.items() if r is not None)
    warnings.warn(f"sparse_attn runs {label} in plain PyTorch ({why})", stacklevel=5)
