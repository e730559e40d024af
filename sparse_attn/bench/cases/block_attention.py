"""`block_select` and `block_attention` (blocks and tiles of 64) against dense SDPA and as many keys by exact top-k."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import contenders, correctness
from sparse_attn.bench.attention import AttentionCase, AttentionOp, Triple, select
from sparse_attn.bench.registry import Comparison, Work

BLOCK = 64
BASE = AttentionCase("block_attention", 8192, top_k=16 * BLOCK)


class BlockAttention(AttentionOp):
    """`top_k` counts keys: a sixty-fourth as many blocks."""

    name = "block_attention"
    suite = "selection"
    labels: ClassVar = {
        "ours": "block_select + block_attention",
        "attend": "block_attention, blocks given",
        "exact": "topk_attention, as many keys",
        "sdpa": "SDPA (dense)",
    }

    def problem(self, contender: str, case: AttentionCase) -> str | None:
        whole = (case.length, case.queries, case.top_k)
        if any(n % BLOCK for n in whole) or case.queries != case.length or not case.causal:
            return f"blocks of {BLOCK} are compared on causal self-attention with lengths and top_k of whole blocks"
        return None

    def ours(self, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        return lambda q, k, v: sparse_attn.block_attention(q, k, v, _choose(case, q, k), is_causal=True)

    def plain(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        if contender == "exact":
            return lambda q, k, v: sparse_attn.topk_attention(q, k, v, case.top_k, is_causal=True)
        blocks = _choose(case, *tensors[:2])
        return lambda q, k, v: sparse_attn.block_attention(q, k, v, blocks, is_causal=True)

    def used(self, contender: str, case: AttentionCase, tensors: Triple) -> Tensor | None:
        if contender == "sdpa":
            return None
        if contender == "exact":
            return select(case, tensors)
        tiles = _choose(case, *tensors[:2]).long()  # [B, H, tiles, n]
        tokens = (tiles.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(3)
        tokens = tokens.repeat_interleave(BLOCK, dim=2)[:, :, : case.length]
        own = torch.arange(case.length).unsqueeze(-1)
        return torch.where((tokens >= 0) & (tokens <= own), tokens, -1).int()

    def check(self, contender: str, case: AttentionCase, inputs: Triple, work: Work) -> None:
        correctness.check_attention(contender, case, work, self.used(contender, case, inputs))

    def cases(self) -> list[AttentionCase]:
        return [
            replace(BASE, length=length, direction=direction)
            for length in (4096, 8192)
            for direction in ("forward", "both")
        ]

    def comparisons(self, quick: bool) -> list[Comparison]:
        rivals = ("attend", "exact", "sdpa")
        rows = [
            Comparison(case, rivals, rounds=7, seconds=1.0 if quick else 15.0)
            for case in (BASE, replace(BASE, direction="both"))
        ]
        return [replace(row, case=replace(row.case, length=2048)) for row in rows] if quick else rows


def _choose(case: AttentionCase, query: Tensor, key: Tensor) -> Tensor:
    """int32 [B, H, tiles, n]: the blocks of each tile of queries."""
    with torch.no_grad():
        return sparse_attn.block_select(query, key, case.top_k // BLOCK, is_causal=True)


OP = BlockAttention()
