"""`varlen_topk_attention` over the pages of a cache against the same keys end to end, a batch, and separate calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import contenders
from sparse_attn.bench.attention import LABELS, AttentionCase, AttentionOp, Triple, rule
from sparse_attn.bench.registry import Comparison, Work, WrongResult


@dataclass(frozen=True)
class PagedCase(AttentionCase):
    """A step of a server: `batch` sequences with queries of their own."""

    page_size: int = 16

    def __str__(self) -> str:
        return f"{super().__str__()} pages of {self.page_size}"


STEP = PagedCase("paged_attention", 8192, batch=16, query_length=1)


class PagedAttention(AttentionOp):
    name, gradients = "paged_attention", False
    labels: ClassVar = {
        "ours": "varlen_topk_attention, pages",
        "pages": "varlen_topk_attention, pages without an index",
        "end_to_end": "varlen_topk_attention, end to end",
        "batch": "topk_attention, one batch",
        "separate": "topk_attention, a call per sequence",
        "sdpa": LABELS["sdpa"],
    }

    def ours(self, case: PagedCase, tensors: Triple) -> contenders.Forward:
        return self.over_pages(case, tensors, case.key_index)

    def over_pages(self, case: PagedCase, tensors: Triple, with_index: bool) -> contenders.Forward:
        _, key, value = (t.detach() for t in tensors)
        count = key.shape[0] * key.shape[2] // case.page_size
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        pages = []
        for rows in (key, value):
            own = _packed(rows).unflatten(0, (count, case.page_size))
            pages.append(torch.empty_like(own).index_copy_(0, order, own))
        table = order.view(key.shape[0], -1).to(torch.int32)
        used = torch.full((key.shape[0],), case.length)
        slots = torch.arange(count * case.page_size) if with_index else None
        index = None if slots is None else sparse_attn.PagedKeyIndex.of(pages[0], slots)
        return lambda q, *_: _step(case, q, *pages, None, seqused_k=used, block_table=table, key_index=index)

    def problem(self, contender: str, case: PagedCase) -> str | None:
        if contender == "pages" and not case.key_index:
            return "ours has no index"
        return super().problem(contender, case)

    def plain(self, contender: str, case: PagedCase, tensors: Triple) -> contenders.Forward:
        options = rule(case)
        if contender == "pages":
            return self.over_pages(case, tensors, False)
        if contender == "batch":
            return lambda q, k, v: sparse_attn.topk_attention(q, k, v, case.top_k, **options)
        if contender == "separate":

            def one_by_one(*leaves: Tensor) -> Tensor:
                each = zip(*(t.split(1) for t in leaves), strict=True)
                return torch.cat([sparse_attn.topk_attention(*own, case.top_k, **options) for own in each])

            return one_by_one
        _, key, value = (t.detach() for t in tensors)
        packed = _packed(key), _packed(value)
        cu_seq_k = torch.arange(key.shape[0] + 1) * case.length
        return lambda q, *_: _step(case, q, *packed, cu_seq_k)

    def check(self, contender: str, case: PagedCase, inputs: Triple, work: Work) -> None:
        super().check(contender, case, inputs, work)
        if contender == "ours":
            rival = self.plain("end_to_end", case, inputs)
            with torch.no_grad():
                if not torch.equal(work.forward(*work.leaves), rival(*work.leaves)):
                    raise WrongResult(f"{case}: pages give other bits than the same keys end to end")

    def cases(self) -> list[AttentionCase]:
        return [
            STEP,
            replace(STEP, page_size=256),
            replace(STEP, query_length=4, dtype="bfloat16"),
            replace(STEP, page_size=64, key_index=True),
        ]

    def comparisons(self, quick: bool) -> list[Comparison]:
        half = {"heads": 32, "head_dim": 128, "dtype": "bfloat16", "top_k": 256, "batch": 8}
        steps = [
            STEP,
            replace(STEP, page_size=64),
            replace(STEP, page_size=256),
            replace(STEP, page_size=1),
            replace(STEP, dtype="bfloat16"),
            replace(STEP, **half),
            replace(STEP, query_length=4),
        ]
        indexed = replace(STEP, page_size=64, key_index=True)
        served = replace(indexed, heads=9, kv_heads=3, top_k=256, batch=4)
        with_index = [indexed, served, replace(indexed, dtype="bfloat16"), replace(indexed, **half)]
        # Single rows in random order are in no cache line, and no entry of the TLB, that was asked for before.
        return [
            Comparison(
                case,
                ("end_to_end", "batch", "separate", "sdpa"),
                {} if case.page_size == 1 else {"end_to_end": 1 / 1.1},
                note="one step over a cache in pages",
            )
            for case in (steps[:1] if quick else steps)
        ] + [
            Comparison(
                case,
                ("pages", "end_to_end", "sdpa"),
                {"pages": 1.0},
                note="one step over a cache in pages, with a PagedKeyIndex",
            )
            for case in (with_index[:1] if quick else with_index)
        ]


def _packed(rows: Tensor) -> Tensor:
    """[B, H, T, D] → [B·T, H, D], contiguous."""
    return rows.transpose(1, 2).flatten(0, 1).contiguous()


def _step(
    case: PagedCase, query: Tensor, key: Tensor, value: Tensor, cu_seq_k: Tensor | None, **pages: Any
) -> Tensor:
    """query [B, Hq, Tq, D] → [B, Hq, Tq, Dv], by a packed call."""
    cu_seq_q = torch.arange(case.batch + 1) * case.queries
    out = sparse_attn.varlen_topk_attention(
        _packed(query), key, value, cu_seq_q, cu_seq_k, case.queries, case.length, case.top_k,
        is_causal=case.causal, window=case.window, sinks=case.sinks, share=case.share, **pages,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(0, (case.batch, case.queries)).transpose(1, 2)


OP = PagedAttention()
