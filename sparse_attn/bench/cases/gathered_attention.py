"""`gathered_attention` with given indices against dense attention, and against a gather in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import sparse_attn
from sparse_attn.bench import contenders
from sparse_attn.bench.attention import (
    DENSE,
    AttentionCase,
    AttentionOp,
    Triple,
    on_real_inputs,
    select,
    with_targets_alone,
)
from sparse_attn.bench.registry import Comparison, Peak

BASE = AttentionCase("gathered_attention", 8192)


class GatheredAttention(AttentionOp):
    name = "gathered_attention"

    def ours(self, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        indices = select(case, tensors)
        return lambda q, k, v: sparse_attn.gathered_attention(q, k, v, indices)

    def plain(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        return contenders.plain_gathered(contender, case, select(case, tensors))

    def comparisons(self, quick: bool) -> list[Comparison]:
        half = {"dtype": "bfloat16"}
        rows = [
            Comparison(BASE, DENSE, {"sdpa": 6}),
            Comparison(replace(BASE, direction="both"), ("sdpa",), {"sdpa": 5}),
            Comparison(replace(BASE, **half), DENSE),
            Comparison(replace(BASE, direction="both", **half), ("sdpa",)),
        ]
        rows = with_targets_alone(rows) if quick else rows
        return [*rows, *on_real_inputs(rows)]

    def scaling(self) -> dict[str, list[AttentionCase]]:
        return {"ours": [replace(BASE, length=n) for n in (1024, 2048, 4096, 8192, 16384, 32768)]}

    def peaks(self, quick: bool) -> list[Peak]:
        return [] if quick else [Peak(replace(BASE, length=32768))]


OP = GatheredAttention()
