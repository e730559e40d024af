"""The launches of tail_attention, forward and backward, as its calls make them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_attn.ops.tail import OP
from sparse_attn.rule import Rule
from triton_wing import aot
from triton_wing.aot_block_attention import launched, leaves


def mean(
    dtype: str, dim: int, kv_heads: int, groups: int, *, rule: bool = False, amd: bool = False
) -> list[aot.Case]:
    inputs = leaves(dtype, 16, kv_heads, 512, dim)
    indices = torch.zeros(1, groups, 512, 64, dtype=torch.int32)
    options = {"softcap": 2.0, "sink_logits": torch.zeros(16)} if rule else {}
    if rule:
        options["key_starts"] = torch.zeros(1, 512, dtype=torch.int32)
    packed = Rule(is_causal=True, **options).packed(*inputs[:2])._replace(groups=groups)
    return launched(
        f"{dtype} D{dim} H16/{kv_heads} G{groups}" + (", starts, cap and sinks" if rule else ""),
        lambda: OP.on("triton")(*inputs, indices, *packed.parts())[0],
        amd,
    )


def cases() -> list[aot.Case]:
    found = [*mean("bf16", 128, 4, 16), *mean("bf16", 128, 4, 16, amd=True)]
    for amd in (False, True):
        for others in (
            mean("bf16", 64, 16, 16, amd=amd),
            mean("bf16", 128, 4, 4, rule=True, amd=amd),
            mean("fp16", 128, 1, 1, amd=amd),
            mean("bf16", 256, 4, 16, amd=amd),
            mean("fp32", 64, 4, 4, amd=amd),
            mean("fp32", 128, 16, 16, amd=amd),
        ):  # by hand alone: they take minutes
            found += [replace(case, candidate=True) for case in others]
    return found
