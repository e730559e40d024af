"""The launches of block_attention and block_tail, forward and backward, as their calls make them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

import sparse_attn
from sparse_attn.ops.tail import BLOCKS
from sparse_attn.rule import Rule
from triton_wing import aot, first_call

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launched(label: str, call, amd: bool = False) -> list[aot.Case]:
    """What a call launches, forward and backward, as cases."""
    found: list[aot.Case] = []
    with first_call.launches(found), mock.patch.object(torch.version, "hip", "6.0" if amd else None):
        call().sum().backward()
    targets = tuple(t for t in aot.TARGETS if t.startswith("gfx") == amd)
    label += " amd" if amd else ""
    special = {True: ", special", False: "", None: ""}
    return [
        replace(case, name=f"{case.name}{special[case.arguments.get('SPECIAL')]} {label}", targets=targets)
        for case in found
    ]


def leaves(dtype: str, heads: int, kv_heads: int, length: int, dim: int) -> list[torch.Tensor]:
    sizes = (heads, kv_heads, kv_heads)
    return [torch.zeros(1, n, length, dim, dtype=DTYPES[dtype], requires_grad=True) for n in sizes]


def whole_blocks(
    dtype: str, dim: int, kv_heads: int, *, rule: bool = False, amd: bool = False
) -> list[aot.Case]:
    inputs = leaves(dtype, 16, kv_heads, 512, dim)
    blocks = torch.zeros(1, kv_heads, 8, 4, dtype=torch.int32)
    options = {"is_causal": True}
    if rule:
        starts = torch.zeros(1, 512, dtype=torch.int32)
        options |= {"softcap": 2.0, "sink_logits": torch.zeros(16), "key_starts": starts}
    label = f"{dtype} D{dim} H16/{kv_heads}" + (", starts, cap and sinks" if rule else "")
    return launched(
        label, lambda: sparse_attn.block_attention(*inputs, blocks, backend="triton", **options), amd
    )


def tail(dtype: str, dim: int, kv_heads: int, groups: int, *, amd: bool = False) -> list[aot.Case]:
    query, key, value = leaves(dtype, 16, kv_heads, 256, dim)
    means = [t.detach()[:, :, :32].requires_grad_() for t in (key, value)]
    indices = torch.zeros(1, groups, 256, 64, dtype=torch.int32)
    packed = Rule(is_causal=True, causal_offset=1792).packed(query, key)._replace(groups=groups)
    return launched(
        f"tail {dtype} D{dim} H16/{kv_heads} G{groups}",
        lambda: BLOCKS.on("triton")(query, *means, indices, 2048, 64, *packed.parts())[0],
        amd,
    )


def cases() -> list[aot.Case]:
    found = [*whole_blocks("bf16", 128, 4), *tail("bf16", 128, 4, 16)]
    found += whole_blocks("bf16", 128, 4, amd=True)
    found += tail("bf16", 128, 4, 16, amd=True)
    for amd in (False, True):
        for others in (
            whole_blocks("bf16", 64, 16, amd=amd),
            whole_blocks("bf16", 128, 4, rule=True, amd=amd),
            whole_blocks("fp16", 128, 1, amd=amd),
            whole_blocks("bf16", 256, 4, amd=amd),
            whole_blocks("fp32", 64, 4, amd=amd),
            whole_blocks("fp32", 128, 16, amd=amd),
            tail("bf16", 64, 16, 16, amd=amd),
            tail("bf16", 256, 4, 4, amd=amd),
            tail("fp32", 64, 4, 4, amd=amd),
        ):  # by hand alone: they take minutes
            found += [replace(case, candidate=True) for case in others]
    return found
