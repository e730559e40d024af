"""The launches of a decoding step with a key index, and of keys that are added to it, as their calls make them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

from sparse_attn import KeyIndex
from sparse_attn.ops.key_index import OP, WRITE
from sparse_attn.rule import Rule
from sparse_attn.triton_kernels import topk_select
from triton_wing import aot, first_call
from triton_wing.aot_block_attention import DTYPES


def step(
    dtype: str, dim: int, heads: int, kv_heads: int, budget: int, *, amd: bool = False
) -> list[aot.Case]:
    """One query a head, keys split over programs."""
    query = torch.zeros(1, heads, 1, dim, dtype=DTYPES[dtype])
    key = torch.zeros(1, kv_heads, 8192, dim, dtype=DTYPES[dtype])
    index, rule = KeyIndex.of(key), Rule(is_causal=True, causal_offset=8191).packed(query, key, budget)
    found: list[aot.Case] = []
    with (
        first_call.launches(found),
        mock.patch.object(torch.version, "hip", "6.0" if amd else None),
        mock.patch.object(topk_select, "_processors", return_value=132),
    ):
        for keys in (key[:, :, :1], key):
            WRITE.on("triton")(keys, *index.tensors(), 0)
        OP.on("triton")(query, key, budget, *rule.parts(), *index.tensors())
    targets = tuple(t for t in aot.TARGETS if t.startswith("gfx") == amd)
    label = f"{dtype} D{dim} H{heads}/{kv_heads} K{budget}" + (" amd" if amd else "")
    cases = []
    for number, case in enumerate(found):
        if case.kernel is topk_select.select_tiles:
            options = {} if amd else {"maxnreg": 255}  # as on a GPU
            which = "by the index" if case.arguments["INDEXED"] else "again"
            case = replace(case, name=f"{case.name} {which}", options=case.options | options)
        elif number < 2:
            case = replace(case, name=f"{case.name} {('one key', 'many keys')[number]}")
        cases.append(replace(case, name=f"{case.name} {label}", targets=targets))
    return cases


def cases() -> list[aot.Case]:
    found = step("bf16", 128, 32, 8, 64) + step("bf16", 128, 32, 8, 64, amd=True)
    for amd in (False, True):
        for others in (
            step("fp32", 64, 8, 8, 64, amd=amd),
            step("bf16", 64, 16, 1, 512, amd=amd),
            step("bf16", 256, 32, 8, 256, amd=amd),
        ):  # by hand alone
            found += [replace(case, candidate=True) for case in others]
    return found
