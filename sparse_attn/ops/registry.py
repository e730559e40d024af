"""How an op becomes a `torch.library` op: one schema, one fake, one gradient formula, one overload per wing.

The overloads of compiled wings are defined by the extension, so that a program without Python has them too; here it is
checked that they are what Python calls. All others are defined here (nothing may be defined twice).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_attn.wings import base

library = torch.library.Library(base.NAMESPACE, "DEF")

_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")
_WITHOUT_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in _AUTOCAST_KEYS[1:]:
    _WITHOUT_AUTOCAST = _WITHOUT_AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def define(op: str, schema: str, fake: Callable) -> None:
    """Defines `op.<wing>` for every wing that has the op. `schema` is `(arguments) -> results`."""
    for wing in base.wings():
        if op not in wing.implementations:
            continue
        _define(op, wing.name, schema)
        if wing.implementations[op] is not None:
            library.impl(f"{op}.{wing.name}", wing.implementations[op], wing.dispatch_key)
        torch.library.register_fake(f"{base.NAMESPACE}::{op}.{wing.name}", fake, lib=library)
        for key in _AUTOCAST_KEYS:
            library.impl(f"{op}.{wing.name}", _without_autocast(op, wing.name), key)


def _define(op: str, overload: str, schema: str) -> None:
    name = f"{base.NAMESPACE}::{op}"
    try:
        compiled = torch._C._get_schema(name, overload)
    except RuntimeError:  # there is none
        library.define(f"{op}.{overload}{schema}")
        return
    expected = torch._C.parse_schema(f"{name}.{overload}{schema}")
    if compiled != expected:
        raise RuntimeError(
            f"the compiled extension is of another version of sparse_attn than its Python files: it defines "
            f"{compiled}, they call {expected}; reinstall sparse_attn"
        )


def _without_autocast(op: str, wing: str) -> Callable:
    """The op with autocast off inside: its own matrix products would lose their float32 accumulation otherwise."""

    def kernel(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(_WITHOUT_AUTOCAST):
            return base.overload(op, wing)(*arguments)

    return kernel


def differentiate(op: str, setup_context: Callable, backward_of: Callable[[str], Callable]) -> None:
    """Registers the gradient of every wing's `op`; `backward_of(wing name)` makes the formula that calls that wing."""
    for wing in base.wings():
        if op in wing.implementations:
            torch.library.register_autograd(
                f"{base.NAMESPACE}::{op}.{wing.name}",
                backward_of(wing.name),
                setup_context=setup_context,
                lib=library,
            )
