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
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from sparse_attn.rule import EVERY_PART, Rule

NAMESPACE = "sparse_attn"
NO_SIZES: dict[str, int] = {}
CANNOT = "docs/troubleshooting.md#a-backend-cannot-run-here"
SLOW = "docs/troubleshooting.md#plain-pytorch-on-an-accelerator"


@dataclass(frozen=True)
class Wing:
    """One backend.

    `implementations` maps an op's name to its Python function, or to None where C++ registers the kernel.
    `why_not(op, device, dtype)` is None where the wing takes such a call, else the reason in one clause.
    `limits` are the largest sizes that it takes, by the names that the ops give to `choose` (head_dim, …); of an
    option that it does not have, 0. `rule` names the parts of the rule that its kernels know; None: all.
    `way(op, sizes)` says how such a call goes, where the wing has more than one way.
    `behind` names for an op the wing that goes first, where it takes the call, though it was registered later.
    `watch()` is a context; the list that it yields says at its end what the wing's calls did. None: it does not know.
    A wing that is `by_name_only` runs only when a call or `use_backend` names it.
    """

    name: str
    dispatch_key: str
    implementations: dict[str, Callable | None]
    why_not: Callable[[str, torch.device, torch.dtype], str | None]
    limits: dict[str, int] = field(default_factory=dict)
    rule: frozenset[str] | None = None
    by_name_only: bool = False
    behind: dict[str, str] = field(default_factory=dict)
    way: Callable[[str, dict[str, int]], str | None] = lambda op, sizes: None
    watch: Callable[[], AbstractContextManager[list[str]]] | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule >= EVERY_PART:
            object.__setattr__(self, "rule", None)  # so that calls need not ask what the rule says

    def refusal(
        self,
        op: str,
        device: torch.device,
        dtype: torch.dtype,
        sizes: dict[str, int],
        rule: Rule | None = None,
    ) -> str | None:
        """None where the wing takes the call, else why not in one clause."""
        if op not in self.implementations:
            # A wing without any op is not there, and knows why.
            absent = None if self.implementations else self.why_not(op, device, dtype)
            return absent or f"it has no {op}"
        reason = self.why_not(op, device, dtype)
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
    warned: set[str] = field(default_factory=set)
    blocks: bool = False  # whether there ever was a `use_backend` block


_state = _State()


class _Block:
    """One `use_backend` block: the wing that it forces, and the block of the same thread that it stands in."""

    __slots__ = ("ended", "name", "outer")

    def __init__(self, name: str | None, outer: _Block | None) -> None:
        self.name, self.outer, self.ended = name, outer, False


class _Thread:
    """What is set in one thread alone; `plain` where nothing is, which is all that most calls have to read."""

    __slots__ = ("block", "explaining", "plain")

    def __init__(self) -> None:
        self.block = _Block(None, None)  # the innermost one
        self.explaining = False  # whether it is in explain_call
        self.plain = True


class _Here(threading.local):
    """Not a ContextVar: a compiled graph cannot guard on one."""

    def __init__(self) -> None:
        self.thread = _Thread()


_here = _Here()
# From 2.13 on torch hands the context of who calls backward to autograd's own threads, under this name.
_CONTEXT = "context"
_passed_on: ContextVar[_Block | None] = ContextVar("sparse_attn.use_backend", default=None)


def register(wing: Wing) -> None:
    """Adds a wing; the first registered is the most preferred."""
    _state.wings[wing.name] = wing


def wings() -> tuple[Wing, ...]:
    """All wings, the most preferred first."""
    return tuple(_state.wings.values())


def check_name(name: object) -> str:
    if not isinstance(name, str) or name not in _state.wings:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _state.wings))} or None, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one wing for every call of this thread inside the `with` block.

    Other threads are not affected, nor are those that are started inside the block: each opens a block of its own.
    Gradients run on the wing of their forward, in whatever thread and wherever backward is called. What a backward
    computes again (`torch.utils.checkpoint`) runs on the wing that is forced where it is called; on a GPU, where that
    is a thread of autograd, from torch 2.13 on. Blocks may end in any order, and in another thread (a generator that
    is closed there).

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
        check_name(name)
    block = _Block(name, _innermost())
    try:
        _enter(block)
        yield
    finally:
        # Where another thread ends it, the block's own thread finds it ended when it looks next.
        block.ended = True
        _innermost()


def _enter(block: _Block) -> None:
    thread = _here.thread
    thread.block = block
    thread.plain = block.outer is None and not thread.explaining
    if not is_dynamo_compiling():
        _state.blocks = True
        _passed_on.set(block)


def _going_on(block: _Block) -> _Block:
    """A block that has not ended, this one or the next around it; the outermost, which forces nothing, never does."""
    while block.ended and block.outer is not None:
        block = block.outer
    return block


def _innermost() -> _Block:
    """This thread's innermost block."""
    block = _here.thread.block
    if block.ended:
        block = _going_on(block)
        _enter(block)
    return block


def _forced() -> str | None:
    """The wing that `use_backend` forces on this thread, or on the one whose backward this thread of autograd runs."""
    block = _innermost()
    if block.outer is None and not is_dynamo_compiling() and torch._C._is_key_in_tls(_CONTEXT):
        block = _going_on(torch._C._get_obj_in_tls(_CONTEXT).get(_passed_on) or block)
    return block.name


def forced_wing(backend: str | None) -> str | None:
    """The wing that a call with this `backend` must run on, if any."""
    if backend is not None:
        return check_name(backend)
    if _here.thread.plain and (is_dynamo_compiling() or not _state.blocks):
        return None
    return _forced()


def reasons(
    op: str, device: torch.device, dtype: torch.dtype, rule: Rule | None = None, **sizes: int
) -> dict[str, str | None]:
    """For each wing None if it takes the call, else why not."""
    return {w.name: w.refusal(op, device, dtype, sizes, rule) for w in _state.wings.values()}


def first_of(op: str, tensor: Tensor) -> str:
    """The most preferred wing that takes such a call of an op that no caller chooses a wing for."""
    found = (
        w for w in _state.wings.values()
        if not w.by_name_only and w.refusal(op, tensor.device, tensor.dtype, NO_SIZES) is None
    )  # fmt: skip
    return next(found).name


def choose(
    op: str,
    tensor: Tensor,
    backend: str | None,
    function: str | None = None,
    rule: Rule | None = None,
    sizes: dict[str, int] = NO_SIZES,
) -> str:
    """The name of the wing that runs `op` on such tensors; `backend` (or `use_backend`) forces one.

    `sizes` are those that some wing limits, `function` is the name that the caller knows.
    """
    device, dtype = tensor.device, tensor.dtype
    forced = backend
    plain = _here.thread.plain
    if forced is None and not (plain and (is_dynamo_compiling() or not _state.blocks)):
        forced = _forced()
    chosen = None
    if forced is not None:
        reason = _state.wings[check_name(forced)].refusal(op, device, dtype, sizes, rule)
        if reason is not None:
            raise ValueError(f"backend={forced!r} cannot run {function or op} here: {reason} ({CANNOT})")
        chosen = forced
    else:
        for wing in _state.wings.values():
            if not wing.by_name_only and wing.refusal(op, device, dtype, sizes, rule) is None:
                chosen = wing.name
                first = _state.wings.get(wing.behind[op]) if op in wing.behind else None
                if first is not None and not first.by_name_only:
                    takes = first.refusal(op, device, dtype, sizes, rule) is None
                    chosen = first.name if takes else wing.name
                break
    if chosen is None:
        why = reasons(op, device, dtype, rule, **sizes)
        raise ValueError(f"no backend runs {function or op} on {device.type} with {dtype}: {why} ({CANNOT})")
    if not plain and _here.thread.explaining:
        way = _state.wings[chosen].way(op, sizes)
        raise _Explained(Explanation(function or op, chosen, reasons(op, device, dtype, rule, **sizes), way))
    if chosen == "reference" and forced is None and device.type not in ("cpu", "meta"):
        _warn_reference(op, device, dtype, sizes, rule)
    return chosen


@dataclass(frozen=True)
class Explanation:
    """Which wing a call would run on, and for each other wing why not; `print` it."""

    op: str
    backend: str
    reasons: dict[str, str | None]  # None: it could take the call
    way: str | None = None  # how it goes there, where the wing has several ways
    measured: str | None = None  # what a run of it did, where one was asked for and the wing can say it

    def __str__(self) -> str:
        way = f": {self.way}" if self.way else ""
        lines = [f"{self.op} runs on the {self.backend!r} wing{way}"]
        if self.measured:
            lines.append(f"  measured: {self.measured}")
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {reason or 'it could, but is less preferred'}")
        return "\n".join(lines)


class _Explained(BaseException):
    """Ends a call that was to be explained, before its first op runs; nobody takes it for a failure of the call."""


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
    thread, before = _here.thread, _here.thread.explaining
    try:
        thread.explaining, thread.plain = True, False
        function(*arguments, **options)
    except _Explained as end:
        return end.args[0]
    finally:
        thread.explaining = before
        thread.plain = thread.block.outer is None and not before
    raise TypeError(f"explain_call takes a function that calls an op of sparse_attn, got {function!r}")


def measured(explanation: Explanation, run: Callable[[], Any]) -> Explanation:
    """The explanation of a call with what the wing did in `run`, the call itself."""
    watch = _state.wings[explanation.backend].watch
    if watch is None:
        return explanation
    with watch() as said:
        run()
    return replace(explanation, measured="; ".join(said) or None)


def _warn_reference(
    op: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], rule: Rule | None
) -> None:
    """No silent fallback: on an accelerator the slow path says so, once per op and device type."""
    label = f"{op} on {device.type}"
    if torch.compiler.is_compiling() or label in _state.warned:
        return
    refusals = reasons(op, device, dtype, rule, **sizes)
    why = "; ".join(f"{n}: {r}" for n, r in refusals.items() if r is not None)
    warnings.warn(f"sparse_attn runs {label} in plain PyTorch ({why}); {SLOW}", stacklevel=5)
    _state.warned.add(label)  # not before: where warnings are errors, the next call is one too
