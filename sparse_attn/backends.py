"""The one dispatcher: which wing (backend) runs an op, and why the others do not.

A wing is one implementation of the ops. Each wing is one overload of each op that it has: the op `topk_select`
of the wing `cpu` is `torch.ops.sparse_attn.topk_select.cpu`. The choice is made once per call from device and
dtype, and the autograd formula of an overload calls the backward of the same wing, so a forced wing serves
gradients too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMESPACE = "sparse_attn"


@dataclass(frozen=True)
class Wing:
    """One backend.

    `implementations` maps an op's name to its Python function, or to None where C++ registers the kernel.
    `why_not(op, device_type, dtype)` is None where the wing takes such a call, else the reason in one clause.
    """

    name: str
    dispatch_key: str
    implementations: dict[str, Callable | None]
    why_not: Callable[[str, str, torch.dtype], str | None]


@dataclass
class _State:
    wings: dict[str, Wing] = field(default_factory=dict)  # in order of preference
    # A plain global, not a ContextVar: autograd's own threads do not see the latter.
    forced: str | None = None
    warned: set[str] = field(default_factory=set)


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
        name: "cpu" or "reference". A call that the wing cannot take raises ValueError instead of falling back.
            None leaves the choice to the package again, inside another such block.

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


def reasons(op: str, device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """For each wing None if it takes the call, else why not."""
    return {
        w.name: w.why_not(op, device_type, dtype) if op in w.implementations else f"it has no {op}"
        for w in _state.wings.values()
    }


def choose(op: str, tensor: Tensor, backend: str | None) -> str:
    """The name of the wing that runs `op` on such tensors; `backend` (or `use_backend`) forces one."""
    device_type, dtype = tensor.device.type, tensor.dtype
    forced = backend if backend is not None else _state.forced
    if forced is not None:
        wing = _state.wings[_check_name(forced)]
        reason = wing.why_not(op, device_type, dtype) if op in wing.implementations else f"it has no {op}"
        if reason is not None:
            raise ValueError(f"backend={forced!r} cannot run {op} here: {reason}")
        return forced
    for wing in _state.wings.values():
        if op in wing.implementations and wing.why_not(op, device_type, dtype) is None:
            if wing.name == "reference" and device_type not in ("cpu", "meta"):
                _warn_reference(op, device_type, dtype)
            return wing.name
    raise ValueError(f"no backend runs {op} on {device_type} with {dtype}: {reasons(op, device_type, dtype)}")


def _warn_reference(op: str, device_type: str, dtype: torch.dtype) -> None:
    """No silent fallback: on an accelerator the slow path says so, once per op and device type."""
    label = f"{op} on {device_type}"
    if torch.compiler.is_compiling() or label in _state.warned:
        return
    _state.warned.add(label)
    why = "; ".join(f"{n}: {r}" for n, r in reasons(op, device_type, dtype).items() if r is not None)
    warnings.warn(f"sparse_attn runs {label} in plain PyTorch ({why})", stacklevel=4)


def overload(op: str, wing: str) -> Callable:
    """`torch.ops.sparse_attn.<op>.<wing>`."""
    return getattr(getattr(torch.ops.sparse_attn, op), wing)
