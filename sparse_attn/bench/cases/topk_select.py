"""`topk_select` against scores + torch.topk in plain PyTorch, and against the matmul of the scores alone."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

import sparse_attn
from sparse_attn.bench import contenders, correctness
from sparse_attn.bench.attention import LABELS, PLAIN, AttentionCase, AttentionOp, Triple, rule
from sparse_attn.bench.registry import Comparison, Work

BASE = AttentionCase("topk_select", 4096)


class TopkSelect(AttentionOp):
    name = "topk_select"
    labels: ClassVar = {name: LABELS[name] for name in ("ours", *PLAIN)} | {"scores": "scores alone (matmul)"}
    dense = ("scores",)
    gradients = False

    def ours(self, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        options = rule(case)
        return lambda query, key, value: sparse_attn.topk_select(query, key, case.top_k, **options)

    def plain(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        if contender == "scores":
            shared = case.heads // case.kv_heads
            return lambda query, key, value: query @ key.repeat_interleave(shared, dim=1).mT
        return lambda query, key, value: contenders.plain_indices(contender, case, query, key)

    def check(self, contender: str, case: AttentionCase, inputs: Triple, work: Work) -> None:
        if contender == "scores":  # not a selection: what its arithmetic costs as one product
            return
        with torch.no_grad():
            correctness.check_selection(contender, case, work.forward(*work.leaves), inputs)

    def comparisons(self, quick: bool) -> list[Comparison]:
        rivals = (*PLAIN, "scores")
        rows = [Comparison(BASE, rivals), Comparison(replace(BASE, dtype="bfloat16"), rivals)]
        return [] if quick else rows


OP = TopkSelect()
