"""The wing of csrc/cpu: kernels compiled into `sparse_attn._C`, for the instruction set that the CPU has."""

from __future__ import annotations

import torch

from sparse_attn.rule import EVERY_PART
from sparse_attn.wings import extension
from sparse_attn.wings.base import Wing, register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if extension.load_error is not None:
        return extension.load_error
    if device_type != "cpu":
        return f"it takes cpu tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return None


def _way(op: str, sizes: dict[str, int]) -> str | None:
    """As csrc/cpu/topk_decode.h and ops/key_index.py have it."""
    if op not in ("topk_select", "topk_attention"):
        return None
    if "key_index" in sizes:
        return "few queries; what the key index cannot rule out is scored"
    if sizes["queries"] <= 16 and "rounded_scores" not in sizes and "blocks" not in sizes:
        return "few queries; each key is read once and none is packed"
    return "keys are packed, then scored in tiles"


CPU_WING = Wing("cpu", "CPU", extension.ops_of("cpu", "CPU"), _why_not, rule=EVERY_PART, way=_way)
register(CPU_WING)
