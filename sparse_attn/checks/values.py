"""Checks of single values, and the words for what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Positions up to here can be added to each other and to a tensor's size within int64, in every wing.
_LARGEST = 2**62 - 1


def describe(value: object) -> str:
    """What came, in a few words: `a float32 tensor of shape [2, 3]`, or `'abc' (str)`."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor of shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def integer(name: str, value: Any, minimum: int = -_LARGEST, maximum: int = _LARGEST) -> int:
    """An int (or a symbolic one), not a bool; numpy integers are taken too."""
    # The plain int first: every call checks several.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
        value = value.__index__()
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return value


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if type(value) is not Tensor and hasattr(value, "placements"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {value.placements}: this call has "
            "no rule for it; call it on local tensors (DTensor.to_local, or local_map around the call)"
        )


def has_values(tensor: Tensor) -> bool:
    """Whether its elements can be read: a compiler, a fake tensor and the meta device have none."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta" and not is_fake(tensor)


def few_numbers(tensor: Tensor) -> list[int] | None:
    """The elements of a short integer tensor [N] on the CPU: a call of torch costs more than all of them.

    None where there are many, where they cannot be read, and where somebody records the call: what is made of these
    numbers would be a constant in the record.
    """
    if tensor.device.type != "cpu" or tensor.dim() != 1 or tensor.shape[0] > 256 or not has_values(tensor):
        return None
    if is_in_torch_dispatch_mode() or torch._C._get_tracing_state() is not None:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    numbers: list[int] = tensor.tolist()
    return numbers


def bare(tensor: Tensor) -> Tensor:
    """The tensor itself where torch.func wrapped it: it can be read, and has the dimensions of every vmap, too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def mapped(tensor: Tensor) -> bool:
    """Whether some vmap maps over it."""
    return bare(tensor).dim() > tensor.dim()


def first(bad: Tensor, *values: Tensor) -> tuple[list[int], list[int]] | None:
    """Where `bad` holds first, and the values there; None where nowhere, in no entry of a vmap."""
    if not bool(bare(bad).any()):
        return None
    # Together, so that all have the dimensions of vmap in one place, the front.
    table = bare(torch.stack(torch.broadcast_tensors(bad.long(), *(v.long() for v in values)), dim=-1))
    place = table[..., 0].nonzero()[0].tolist()
    return place[len(place) - bad.dim() :], table[tuple(place)][1:].tolist()


def token_batch(what: str, tokens: Tensor, vocabulary: int | None = None) -> None:
    """That `tokens` is int [B, T] with at least one token and, where it is known, ids below `vocabulary`."""
    whole = isinstance(tokens, Tensor) and tokens.dtype in (torch.int32, torch.int64) and tokens.dim() == 2
    if not whole:
        raise TypeError(f"{what} token ids, int64 [B, T], got {describe(tokens)}")
    if tokens.numel() == 0:
        raise ValueError(f"{what} at least one token, got shape {list(tokens.shape)}")
    if vocabulary is not None:
        low, high = (int(n) for n in tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"{what} ids in 0 … {vocabulary - 1}, the model's vocabulary, got {low if low < 0 else high}"
            )
