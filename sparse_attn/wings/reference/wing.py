"""The pure-PyTorch wing itself; each op's definition adds itself with `@implements`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_attn.wings.base import Wing


def _why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64 and device_type == "mps":
        return "MPS has no float64"
    return None


REFERENCE_WING = Wing("reference", "CompositeExplicitAutograd", {}, _why_not)


def implements(function: Callable) -> Callable:
    """The definition of the op that has the function's name."""
    REFERENCE_WING.implementations[function.__name__] = function
    return function
