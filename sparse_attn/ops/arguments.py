"""What the ops share before they dispatch: autocast, and the sizes that some wing limits."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under `torch.autocast` the tensors in its dtype, as scaled_dot_product_attention does; else as they are."""
    first = tensors[0]
    # Asked of all device types at once first: to know the tensor's costs more than the rest.
    if not torch._C._is_any_autocast_enabled() or not isinstance(first, Tensor):
        return tensors
    device_type = first.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def sizes_of(query: Tensor, value: Tensor | None = None) -> dict[str, int]:
    """What some wing limits (`Wing.limits`)."""
    sizes = {"head_dim": query.shape[3]}
    if value is not None:
        sizes["value_dim"] = value.shape[3]
    return sizes
