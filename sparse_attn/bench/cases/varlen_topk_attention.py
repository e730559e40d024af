"""`varlen_topk_attention` of packed documents against a padded batch, a dense mask, and calls of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from sparse_attn.bench import contenders, correctness
from sparse_attn.bench.attention import AttentionCase, AttentionOp, Triple
from sparse_attn.bench.registry import Comparison, Work


@dataclass(frozen=True)
class PackedCase(AttentionCase):
    """`length` tokens in documents end to end, the n-th of them 1/n as long as the first (Zipf's law)."""

    documents: int = 64

    def __str__(self) -> str:
        return f"{super().__str__()} {self.documents} documents"

    @property
    def lengths(self) -> list[int]:
        """Of the documents, in an order that has nothing to do with them."""
        whole = sum(1 / n for n in range(1, self.documents + 1))
        ends = [0.0]
        for n in range(1, self.documents + 1):
            ends.append(ends[-1] + 1 / n)
        at = [round(self.length * end / whole) for end in ends]
        lengths = [end - begin for begin, end in pairwise(at)]
        order = torch.randperm(self.documents, generator=torch.Generator().manual_seed(0))
        return [lengths[n] for n in order.tolist()]


# Two heads: a padded batch of eight takes 10 GB. Heads change no ratio.
PACK = PackedCase("varlen_topk_attention", 32768, direction="both", heads=2, kv_heads=2)
SMALL = replace(PACK, length=4096, documents=16)


class VarlenTopkAttention(AttentionOp):
    name = "varlen_topk_attention"
    labels: ClassVar = {
        "ours": "varlen_topk_attention",
        "padded": "topk_attention, a padded batch",
        "separate": "topk_attention, a call per document",
        "sdpa": "SDPA (dense), block-diagonal mask",
        "sdpa_each": "SDPA (dense), a call per document",
    }
    dense = ("sdpa", "sdpa_each")

    def prepare(self, contender: str, case: PackedCase, inputs: Triple) -> Work:
        # Training loaders pad before the clock runs.
        leaves = tuple(_padded(case, t) for t in inputs) if contender == "padded" else inputs
        return Work(self.forward(contender, case, inputs), leaves)

    def forward(self, contender: str, case: PackedCase, tensors: Triple) -> contenders.Forward:
        if contender == "ours":
            return self.ours(case, tensors)
        if contender == "padded":
            used = torch.tensor(case.lengths)
            return lambda q, k, v: sparse_attn.topk_attention(
                q, k, v, case.top_k, is_causal=True, key_lengths=used
            )
        if contender == "sdpa":
            mask = _block_diagonal(case)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if contender == "separate":
            return _each(
                case, lambda q, k, v: sparse_attn.topk_attention(q, k, v, case.top_k, is_causal=True)
            )
        return _each(case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def ours(self, case: PackedCase, tensors: Triple) -> contenders.Forward:
        cu_seq, longest = _bounds(case), max(case.lengths)

        def packed(*leaves: Tensor) -> Tensor:
            rows = (t[0].transpose(0, 1) for t in leaves)  # [T, H, D], views
            out = sparse_attn.varlen_topk_attention(
                *rows, cu_seq, None, longest, longest, case.top_k, is_causal=True
            )
            assert isinstance(out, Tensor)
            return out.transpose(0, 1)[None]

        return packed

    def used(self, contender: str, case: PackedCase, tensors: Triple) -> Tensor | None:
        if contender in self.dense:
            return None
        query, key, _ = (t.detach()[0].transpose(0, 1) for t in tensors)
        longest, cu_seq = max(case.lengths), _bounds(case)
        own = sparse_attn.varlen_topk_select(
            query, key, cu_seq, None, longest, longest, case.top_k, is_causal=True
        )
        return torch.where(own >= 0, own + _starts(case)[:, None, None], -1).transpose(0, 1)[None]

    def check(self, contender: str, case: PackedCase, inputs: Triple, work: Work) -> None:
        if contender == "padded":
            run = work.forward
            work = Work(lambda *leaves: _unpadded(case, run(*(_padded(case, t) for t in leaves))), inputs)
        chosen = self.used(contender, case, inputs)
        correctness.check_attention(contender, case, work, chosen, first=_starts(case))

    def cases(self) -> list[AttentionCase]:
        return [SMALL, replace(SMALL, direction="forward"), replace(SMALL, dtype="bfloat16")]

    def comparisons(self, quick: bool) -> list[Comparison]:
        rivals = ("padded", "separate", "sdpa_each")
        if quick:
            note = "a short pack, for which no target was set"
            return [Comparison(SMALL, (*rivals, "sdpa"), note=note)]
        note = "documents of Zipf lengths, the longest a fifth of all"
        rows = [
            Comparison(case, rivals, {"padded": 3.0} if case.direction == "both" else {}, note=note, least=3)
            for case in (PACK, replace(PACK, direction="forward"), replace(PACK, dtype="bfloat16"))
        ]
        # A mask of [T, T] for 32,768 tokens takes 5 GB and minutes per head: half as many tell, a quarter of the work.
        masked = replace(PACK, length=16384, heads=1, kv_heads=1)
        note = "half as many tokens, for the mask's sake; the ratio grows with them"
        return [*rows, Comparison(masked, ("sdpa",), {"sdpa": 2.0}, note=note, rounds=3, least=2)]

    def warm_up(self, contender: str, case: PackedCase) -> Work:
        return self.prepare(contender, SMALL, self.inputs(SMALL))


def _bounds(case: PackedCase) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0)


def _starts(case: PackedCase) -> Tensor:
    """int64 [T]: where each token's document begins."""
    lengths = torch.tensor(case.lengths)
    return _bounds(case)[:-1].repeat_interleave(lengths)


@lru_cache(maxsize=1)
def _block_diagonal(case: PackedCase) -> Tensor:
    """bool [T, T], True where a query sees a key."""
    own, at = _starts(case), torch.arange(case.length)
    return (at >= own.unsqueeze(-1)) & (at <= at.unsqueeze(-1))


def _each(case: PackedCase, call: Callable[..., Tensor]) -> contenders.Forward:
    lengths = case.lengths
    return lambda *leaves: torch.cat(
        [call(*own) for own in zip(*(t.split(lengths, dim=2) for t in leaves), strict=True)], dim=2
    )


def _padded(case: PackedCase, rows: Tensor) -> Tensor:
    """[1, H, T, D] → [documents, H, longest, D], zeros behind each document."""
    longest = max(case.lengths)
    return torch.cat(
        [F.pad(own, (0, 0, 0, longest - own.shape[2])) for own in rows.split(case.lengths, dim=2)]
    )


def _unpadded(case: PackedCase, rows: Tensor) -> Tensor:
    """The other way."""
    return torch.cat([own[None, :, :n] for own, n in zip(rows, case.lengths, strict=True)], dim=2)


OP = VarlenTopkAttention()
