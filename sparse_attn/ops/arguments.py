"""What the ops share before they dispatch: autocast and the checked selection arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under `torch.autocast` the tensors in its dtype, as scaled_dot_product_attention does; else as they are."""
    first = tensors[0]
    if not isinstance(first, Tensor):
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


def selection(
    query: Tensor,
    key: Tensor,
    top_k: object,
    is_causal: object,
    causal_offset: object,
    attn_mask: object,
    key_lengths: object,
    scale: object,
    window: object,
    sinks: object,
    share: object,
) -> tuple[Tensor | None, Tensor | None, int, bool, int, float, int, int, int]:
    """The checked selection arguments in the order of the ops' schemas (query and key are checked already)."""
    is_causal = checks.boolean("is_causal", is_causal)
    top_k, window, sinks = checks.budget(top_k, window, sinks, is_causal)
    groups = checks.groups_of(share, query.shape[1], key.shape[1])
    return (
        checks.mask_of(attn_mask, query, key, groups),
        checks.lengths_of(key_lengths, key),
        top_k,
        is_causal,
        checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2]),
        checks.softmax_scale(scale, query.shape[3]),
        window,
        sinks,
        groups,
    )
