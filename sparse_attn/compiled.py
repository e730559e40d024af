"""The wings that live in the compiled extension `sparse_attn._C`, and why they are absent where they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from sparse_attn.backends import Wing, register

CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _load() -> tuple[object | None, str | None]:
    try:
        return import_module("sparse_attn._C"), None
    except ModuleNotFoundError as error:
        if error.name != "sparse_attn._C":
            raise
        note = Path(__file__).with_name("_no_extension.txt")  # left by an install that could not compile
        why = note.read_text().strip().splitlines()[0] if note.exists() else "it was never built"
        return None, f"the compiled extension sparse_attn._C is not installed: {why}"
    except ImportError as error:
        return None, f"the compiled extension sparse_attn._C failed to load: {error}"


extension, load_error = _load()


def _cpu_why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if load_error is not None:
        return load_error
    if device_type != "cpu":
        return f"it takes cpu tensors, got {device_type}"
    if dtype not in CPU_DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return None


CPU_WING = Wing(
    name="cpu",
    dispatch_key="CPU",
    implementations=dict.fromkeys(
        (
            "topk_select",
            "quantized_select",
            "indexer_select",
            "gathered_attention",
            "gathered_attention_backward",
            "refine_blocks",
            "block_attention",
            "block_attention_backward",
            "topk_attention",
            "variable_width_embedding",
            "variable_width_embedding_backward",
            "variable_width_cross_entropy",
            "variable_width_cross_entropy_backward",
        )
    ),
    why_not=_cpu_why_not,
)
register(CPU_WING)
