"""What the attention ops' cases share: one description of a call, its inputs, what a user would call instead.

Causal queries are the last ones where there are fewer of them than keys, as in a cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import contenders, correctness, inputs
from sparse_attn.bench.attention_case import AttentionCase
from sparse_attn.bench.registry import Comparison, Op, Work

Triple = tuple[Tensor, Tensor, Tensor]  # query [B, Hq, Tq, D], key and value [B, Hkv, T, D]

LABELS = {
    "ours": "sparse_attn",
    "sdpa": "SDPA (dense)",
    "sdpa_rows": "SDPA (dense), a group's heads as its queries",
    "flex": "FlexAttention (dense)",
    "plain": "plain PyTorch",
    "plain_tuned": "plain PyTorch, tuned",
}
SETTING = "B1 H8 D64 causal, K=64"
DENSE = ("sdpa", "flex")  # what any row may be compared with
PLAIN = ("plain", "plain_tuned")
# The plain rivals store [H, T, T] scores (and their gradients): in the standard tables they end here.
PLAIN_MAX_SCORES = 8 * 4096**2
# The backward of torch.gather over a broadcast source takes half a minute a call past this.
GATHER_MAX_SCORES = 8 * 1024**2


def rule(case: AttentionCase) -> dict:
    """The selection arguments of the public functions that make this case."""
    offset = {"causal_offset": case.length - case.queries} if case.causal and case.query_length else {}
    return {
        "is_causal": case.causal, **offset,
        "window": case.window, "sinks": case.sinks, "share": case.share,
    }  # fmt: skip


class AttentionOp(Op):
    """An op of query, key and value, or of the first two; a case file adds `ours`, its comparisons and checks."""

    suite = "attention"
    setting = SETTING
    labels = LABELS
    dense = (*DENSE, "sdpa_rows")
    gradients = True  # False: the op's result has none

    def ours(self, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        raise NotImplementedError

    def cases(self) -> list[AttentionCase]:
        return [
            AttentionCase(self.name, length, dtype=dtype, direction=direction, inputs=kind)
            for length in (1024, 4096, 8192)
            for dtype in ("float32", "bfloat16")
            for direction in (("forward", "both") if self.gradients else ("forward",))
            for kind in (("random", "real") if length == 4096 else ("random",))
        ]

    def inputs_problem(self, case: AttentionCase) -> str | None:
        shape = {"batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads}
        return inputs.why_not(case.inputs, case.length, head_dim=case.head_dim, **shape)

    def problem(self, contender: str, case: AttentionCase) -> str | None:
        if contender in PLAIN and case.scores > PLAIN_MAX_SCORES:
            return f"its [H, T, T] scores take {case.scores * 4 / 1e9:.1f} GB at T={case.length}"
        if contender == "plain" and case.direction != "forward" and case.scores > GATHER_MAX_SCORES:
            return "the backward of its torch.gather takes half a minute a call past T=1024"
        if contender == "sdpa_rows" and (case.queries > 1 or case.heads == case.kv_heads):
            return "it is for one query and heads that share keys"
        if contender == "flex":
            if case.direction != "forward":
                return "FlexAttention has no backward on the CPU"
            return contenders.flex_problem()
        return None

    def inputs(self, case: AttentionCase) -> Triple:
        return inputs.make(
            case.inputs,
            case.length,
            batch=case.batch,
            heads=case.heads,
            kv_heads=case.kv_heads,
            query_length=case.query_length,
            head_dim=case.head_dim,
            dtype=case.dtype,
        )

    def prepare(self, contender: str, case: AttentionCase, inputs: Triple) -> Work:
        return Work(self.forward(contender, case, inputs), inputs)

    def forward(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        if contender == "ours":
            return self.ours(case, tensors)
        if contender == "sdpa":
            return contenders.sdpa(case)
        if contender == "sdpa_rows":
            return contenders.sdpa_rows(case)
        if contender == "flex":
            return contenders.flex(case)
        return self.plain(contender, case, tensors)

    def plain(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        raise NotImplementedError

    def used(self, contender: str, case: AttentionCase, tensors: Triple) -> Tensor | None:
        """The keys that the contender attends to, int [B, G, Tq, K]; None: all that are visible."""
        return None if contender in self.dense else select(case, tensors)

    def check(self, contender: str, case: AttentionCase, inputs: Triple, work: Work) -> None:
        correctness.check_attention(contender, case, work, self.used(contender, case, inputs))

    def warm_up(self, contender: str, case: AttentionCase) -> Work:
        few = replace(case, length=min(256, case.length), query_length=None, inputs="random")
        return self.prepare(contender, few, self.inputs(few))

    def peak_facts(self, case: AttentionCase) -> dict:
        return {"length": case.length, "score_matrix_mb": case.scores * 4 / 1e6}


def select(case: AttentionCase, tensors: Triple) -> Tensor:
    """The indices that `gathered_attention` is given, and that a correct `topk_attention` must choose."""
    with torch.no_grad():
        return sparse_attn.topk_select(*tensors[:2], case.top_k, **rule(case))


def on_real_inputs(rows: list[Comparison]) -> list[Comparison]:
    """The comparisons with dense attention once more, on a language model's own queries and keys."""
    return [
        replace(
            row,
            case=replace(row.case, inputs="real"),
            rivals=_dense_and_full(row),
            targets={},
            section="real",
        )
        for row in rows
        if "sdpa" in row.rivals
    ]


def _dense_and_full(row: Comparison) -> tuple[str, ...]:
    return tuple(name for name in ("sdpa", "full_product") if name in row.rivals)


def with_targets_alone(rows: list[Comparison]) -> list[Comparison]:
    """For a smoke test: the rows that have targets, against the rivals that the targets name."""
    return [replace(row, rivals=tuple(row.targets)) for row in rows if row.targets]
