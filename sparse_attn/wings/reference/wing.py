"""The pure-PyTorch wing itself; each op's definition adds itself with `@implements`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sparse_attn.wings import settings
from sparse_attn.wings.base import Wing


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64 and device.type == "mps":
        return "MPS has no float64"
    return None


REFERENCE_WING = Wing("reference", "CompositeExplicitAutograd", {}, _why_not)


def implements(function: Callable) -> Callable:
    """The definition of the op that has the function's name, with the products that its formula says."""

    @functools.wraps(function)
    def exactly(*arguments: Any) -> Any:
        with settings.FLOAT32.off():
            return function(*arguments)

    REFERENCE_WING.implementations[function.__name__] = exactly
    return function
