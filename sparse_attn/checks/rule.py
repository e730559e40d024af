"""Checks of the rule: who may see whom, what is always kept, who shares a selection."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from sparse_attn.checks.values import FLOAT_DTYPES, bare, dense, describe, has_values, integer

SHARES = ("none", "kv", "all")
TAILS = ("none", "mean", "blocks")


def groups_of(share: object, heads: int, kv_heads: int) -> int:
    """G, the number of selections per batch entry."""
    if share == "none":
        return heads
    if share == "kv":
        return kv_heads
    if share == "all":
        return 1
    raise ValueError(f"share must be one of {', '.join(map(repr, SHARES))}, got {describe(share)}")


def budget(top_k: object, window: object, sinks: object, is_causal: bool) -> int:
    """top_k, the whole budget of keys per query."""
    top_k = top_k_of(top_k)
    kept(window, sinks, is_causal, top_k)
    return top_k


def top_k_of(top_k: object) -> int:
    return integer("top_k", top_k, 1, 2**63 - 1)


def kept(window: object, sinks: object, is_causal: bool, top_k: int | None = None) -> tuple[int, int]:
    """(window, sinks): what is always kept, within top_k (checked already) where there is one."""
    window = integer("window", window, 0)
    sinks = integer("sinks", sinks, 0)
    if window > 0 and not is_causal:
        raise ValueError(f"window needs is_causal=True, got window={window} without it")
    if top_k is not None and window + sinks > top_k:
        raise ValueError(
            f"top_k is the whole budget and must be at least window + sinks, "
            f"got top_k={top_k}, window={window}, sinks={sinks}"
        )
    return window, sinks


def causal_offset_of(is_causal: bool, causal_offset: object, query_length: int, key_length: int) -> int:
    """The offset of the causal diagonal: query i sees keys 0 … i + offset."""
    if not is_causal:
        if causal_offset is not None:
            raise ValueError(
                f"causal_offset needs is_causal=True, got causal_offset={causal_offset!r} without it"
            )
        return 0
    if causal_offset is not None:
        return integer("causal_offset", causal_offset)
    if query_length != key_length:
        raise ValueError(
            f"is_causal with {query_length} queries and {key_length} keys needs causal_offset (query i sees keys "
            f"0 … i + causal_offset): {key_length - query_length} if the queries are the last ones, 0 if the first "
            "(docs/troubleshooting.md#queries-and-keys-of-different-lengths)"
        )
    return 0


def softmax_scale(scale: object, head_dim: int) -> float:
    """The factor of q·k; None is the standard 1/√D."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return _finite("scale", scale)


def soft_cap(softcap: object) -> float:
    """The bound of the scores; 0 for none (None)."""
    if softcap is None:
        return 0.0
    number = _finite("softcap", softcap)
    # Within these its reciprocal is a normal number of float32.
    if not 1e-30 <= number <= 1e30:
        raise ValueError(f"softcap must be positive, from 1e-30 to 1e30 (None: no cap), got {number}")
    return number


def _finite(name: str, value: object) -> float:
    # The plain float first, as every call of a model has one: to ask whether something is a Real takes its time.
    if type(value) is float:
        number = value
    elif isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a float or None, got {describe(value)}")
    else:
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite, got an int beyond the range of floats") from None
    if not -math.inf < number < math.inf:  # math.isfinite takes no float of a compiler's
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def sink_logits_of(sink_logits: object, query: Tensor) -> Tensor:
    """sink_logits [Hq] in the dtype of the softmax: float32, with a float64 query float64."""
    if not isinstance(sink_logits, Tensor):
        raise TypeError(f"sink_logits must be a tensor of shape [Hq] or None, got {describe(sink_logits)}")
    if sink_logits.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"sink_logits must be float32, float16, bfloat16 or float64, got {describe(sink_logits)}"
        )
    dense("sink_logits", sink_logits)
    if sink_logits.shape != query.shape[1:2]:
        raise ValueError(
            f"sink_logits must have shape [Hq] = [{query.shape[1]}], got {describe(sink_logits)}"
        )
    if sink_logits.device != query.device:
        raise ValueError(
            f"sink_logits must be on the query's device {query.device}, got {sink_logits.device}"
        )
    return sink_logits.to(torch.promote_types(query.dtype, torch.float32)).contiguous()


def mask_of(
    attn_mask: object, query: Tensor, key: Tensor, groups: int, *, per_group: bool = False
) -> Tensor | None:
    """The mask as bool [B, G, Tq, Tk], a view wherever possible; None stays None.

    `per_group`: it is given per group, not per query head.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a boolean tensor or None, got {describe(attn_mask)}")
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean (True = may attend), got {describe(attn_mask)}; "
            "an additive mask of 0 and -inf is `attn_mask == 0`"
        )
    dense("attn_mask", attn_mask)
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, got {attn_mask.device}")
    batch, heads, query_length = query.shape[:3]
    heads, axes = (groups, "[B, G, Tq, Tk]") if per_group else (heads, "[B, Hq, Tq, Tk]")
    shape = (batch, heads, query_length, key.shape[2])
    given = attn_mask.shape
    if len(given) > 4 or any(n not in (1, want) for n, want in zip(given[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {axes} = {list(shape)}, got {describe(attn_mask)}")
    while attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    if attn_mask.shape[1] == 1 or groups == heads:
        return attn_mask.expand(batch, groups, query_length, shape[3])
    # A mask per head where heads share one selection: it must be the same for all that share.
    heads_of = attn_mask.unflatten(1, (groups, heads // groups))
    first = heads_of[:, :, :1]
    if heads_of.stride(2) != 0 and has_values(heads_of) and not bool(bare(heads_of == first).all()):
        raise ValueError(
            "attn_mask must not differ among query heads that share one selection "
            f"({heads // groups} heads share here), got different masks"
        )
    return first[:, :, 0].expand(batch, groups, query_length, shape[3])


def lengths_of(key_lengths: object, key: Tensor) -> Tensor | None:
    """key_lengths as int32/int64 [B] on the key's device."""
    if key_lengths is None:
        return None
    batch, length = key.shape[0], key.shape[2]
    key_lengths = _whole_numbers("key_lengths", key_lengths, "[B]", key)
    if key_lengths.shape != (batch,):
        raise ValueError(f"key_lengths must have shape [B] = [{batch}], got {describe(key_lengths)}")
    # Reads values: free on the CPU; elsewhere every wing clamps to [0, Tk] instead of synchronising.
    if key.device.type == "cpu" and has_values(key_lengths) and bare(key_lengths).numel():
        low, high = (int(x) for x in bare(key_lengths).aminmax())
        if low < 0 or high > length:
            raise ValueError(
                f"key_lengths must lie in [0, Tk] = [0, {length}], got values from {low} to {high}"
            )
    return key_lengths


def starts_of(key_starts: object, query: Tensor) -> Tensor:
    """key_starts as int32/int64 [B, Tq], a view, on the query's device. Any value means something."""
    return _of_queries("key_starts", key_starts, query)


def offsets_of(is_causal: bool, causal_offset: Tensor, query: Tensor) -> Tensor:
    """The same of a causal_offset that is a tensor."""
    if not is_causal:
        raise ValueError(
            f"causal_offset needs is_causal=True, got causal_offset={describe(causal_offset)} without it"
        )
    return _of_queries("causal_offset", causal_offset, query)


def _of_queries(name: str, numbers: object, query: Tensor) -> Tensor:
    """Whole numbers [B] or [B, Tq] as [B, Tq], a view."""
    numbers = _whole_numbers(name, numbers, "[B] or [B, Tq]", query)
    shape = query.shape[0], query.shape[2]
    if numbers.shape not in (shape[:1], shape):
        raise ValueError(
            f"{name} must have shape [B] = [{shape[0]}] or [B, Tq] = {list(shape)}, got {describe(numbers)}"
        )
    return numbers.unsqueeze(1).expand(shape) if numbers.dim() == 1 else numbers


def _whole_numbers(name: str, tensor: object, shape: str, beside: Tensor) -> Tensor:
    """An int32 or int64 tensor on the device of `beside`, which is the query or the key."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor of shape {shape}, got {describe(tensor)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(tensor)}")
    dense(name, tensor)
    if tensor.device != beside.device:
        raise ValueError(f"{name} must be on the key's device {beside.device}, got {tensor.device}")
    return tensor


def tail_of(tail: object) -> str:
    """What becomes of the attention mass of the keys that are left out."""
    if isinstance(tail, str) and tail in TAILS:
        return tail
    raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {describe(tail)}")
