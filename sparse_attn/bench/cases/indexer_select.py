"""`indexer_select` (4 heads × 32) and `quantized_select` against the exact `topk_select`: what choosing alone costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench.attention import AttentionCase, AttentionOp, rule
from sparse_attn.bench.inputs import DTYPES
from sparse_attn.bench.registry import Comparison, Work, WrongResult

BASE = AttentionCase("indexer_select", 16384)
SAMPLED = 16  # the last queries are held against the reference


class IndexerSelect(AttentionOp):
    name = "indexer_select"
    suite = "selection"
    gradients = False
    dense = ()
    labels: ClassVar = {
        "ours": "indexer_select",
        "int8": "indexer_select, int8",
        "quantized": "quantized_select",
        "exact": "topk_select, share='none'",
        "exact_all": "topk_select, share='all'",
    }

    def problem(self, contender: str, case: AttentionCase) -> str | None:
        return None

    def inputs(self, case: AttentionCase) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "query": (case.batch, case.heads, case.queries, case.head_dim),
            "key": (case.batch, case.kv_heads, case.length, case.head_dim),
            "index_query": (case.batch, 4, case.queries, 32),
            "index_key": (case.batch, 1, case.length, 32),
            "weights": (case.batch, 4, case.queries),
        }
        dtype = DTYPES[case.dtype]
        return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}

    def prepare(self, contender: str, case: AttentionCase, inputs: dict[str, Tensor]) -> Work:
        return Work(_select(contender, case), tuple(inputs.values()))

    def check(self, contender: str, case: AttentionCase, inputs: dict[str, Tensor], work: Work) -> None:
        """The last queries' rows against the reference wing, up to near-ties."""
        first = max(0, case.queries - SAMPLED)
        tail = {n: t if n in ("key", "index_key") else t[:, :, first:] for n, t in inputs.items()}
        few = replace(case, query_length=case.queries - first)
        got = work.forward(*work.leaves)[:, :, first:]
        with sparse_attn.use_backend("reference"):
            want = _select(contender, few)(*tail.values())
        common = (got.unsqueeze(-1) == want.unsqueeze(-2)).any(-1).double().mean().item()
        if common < 0.999:
            raise WrongResult(f"{contender}: {common:.4f} of the selection of {case} is the reference's")

    def cases(self) -> list[AttentionCase]:
        return [replace(BASE, length=n, top_k=k) for n in (4096, 16384) for k in (64, 256)]

    def comparisons(self, quick: bool) -> list[Comparison]:
        length, seconds = (2048, 1.0) if quick else (BASE.length, 15.0)
        rivals = tuple(self.labels)[1:]
        return [
            Comparison(replace(BASE, length=length, top_k=k), rivals, rounds=9, seconds=seconds)
            for k in (64, 256)
        ]


def _select(contender: str, case: AttentionCase) -> Callable[..., Tensor]:
    """The choice, of (query, key, index_query, index_key, weights)."""
    options = rule(case)
    del options["share"], options["window"], options["sinks"]
    if contender == "quantized":
        return lambda q, k, *_: sparse_attn.quantized_select(q, k, case.top_k, **options)
    if contender.startswith("exact"):
        share = "all" if contender == "exact_all" else "none"
        return lambda q, k, *_: sparse_attn.topk_select(q, k, case.top_k, share=share, **options)
    int8 = contender == "int8"
    return lambda q, k, *index: sparse_attn.indexer_select(*index, case.top_k, int8=int8, **options)


OP = IndexerSelect()
