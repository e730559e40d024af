"""The launches of decoding, from pages and a dense cache, as calls on a device of 132 processors make them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

import sparse_attn
from sparse_attn.triton_kernels import topk_select
from sparse_attn.triton_kernels.lib.select_tiles import select_tiles
from triton_wing import aot, first_call

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS, SEQUENCES, ROOM = 32, 16, 8192


def launched(label: str, call, amd: bool) -> list[aot.Case]:
    found: list[aot.Case] = []
    hip = mock.patch.object(torch.version, "hip", "6.0" if amd else None)
    many = mock.patch.object(topk_select, "_processors", return_value=132)
    with first_call.launches(found), hip, many:
        call()
    targets = tuple(t for t in aot.TARGETS if t.startswith("gfx") == amd)
    label += " amd" if amd else ""
    return [
        replace(
            case, name=f"{case.name} {label}", targets=targets,
            options={} if amd or case.kernel is not select_tiles else {"maxnreg": 255},
        )
        for case in found
    ]  # fmt: skip


def paged(
    dtype: str, dim: int, kv_heads: int, top_k: int, page: int, queries: int, share: str, amd: bool
) -> list[aot.Case]:
    query = torch.zeros(SEQUENCES * queries, HEADS, dim, dtype=DTYPES[dtype])
    pages = SEQUENCES * ROOM // page
    key = torch.zeros(1, 1, kv_heads, dim, dtype=DTYPES[dtype]).expand(pages, page, -1, -1)
    table = torch.arange(pages, dtype=torch.int32).view(SEQUENCES, -1)
    used, cu_seq = torch.full((SEQUENCES,), ROOM), torch.arange(SEQUENCES + 1) * queries
    where = cu_seq, None, queries, ROOM
    options = {
        "seqused_k": used,
        "block_table": table,
        "is_causal": True,
        "share": share,
        "backend": "triton",
    }
    return launched(
        f"{dtype} D{dim} H{HEADS}/{kv_heads} K{top_k} share {share}, {queries} of each, pages of {page}",
        lambda: sparse_attn.varlen_topk_attention(query, key, key, *where, top_k, **options),
        amd,
    )


def dense(dtype: str, dim: int, kv_heads: int, top_k: int, amd: bool) -> list[aot.Case]:
    """A step over a cache that is no pages: heads of a key head in one tile, too."""
    query = torch.zeros(1, HEADS, 1, dim, dtype=DTYPES[dtype])
    key = torch.zeros(1, kv_heads, ROOM, dim, dtype=DTYPES[dtype])
    options = {"is_causal": True, "causal_offset": ROOM - 1, "backend": "triton"}
    return launched(
        f"{dtype} D{dim} H{HEADS}/{kv_heads} K{top_k}, dense",
        lambda: sparse_attn.topk_attention(query, key, key, top_k, **options),
        amd,
    )


def cases() -> list[aot.Case]:
    found = []
    for amd in (False, True):
        found += paged("bf16", 128, 8, 256, 64, 1, "none", amd)
    for amd in (False, True):
        found += paged("bf16", 128, 8, 256, 16, 4, "kv", amd)
        found += dense("bf16", 128, 8, 64, amd)
        for others in (
            paged("fp32", 64, 8, 64, 16, 1, "none", amd),
            paged("bf16", 128, 1, 2048, 64, 2, "all", amd),
            paged("bf16", 128, 32, 64, 256, 64, "none", amd),
            dense("fp32", 128, 8, 256, amd),
        ):  # by hand alone
            found += [replace(case, candidate=True) for case in others]
    return found
