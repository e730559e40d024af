"""`topk_attention` against dense attention, and against top-k attention in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.bench import contenders, correctness
from sparse_attn.bench.attention import (
    DENSE,
    LABELS,
    PLAIN,
    AttentionCase,
    AttentionOp,
    Triple,
    on_real_inputs,
    rule,
    select,
    with_targets_alone,
)
from sparse_attn.bench.registry import Comparison, Peak, WrongResult
from sparse_attn.wings import extension
from sparse_attn.wings.cpu import said_of_bounds, selection_by_bounds

BASE = AttentionCase("topk_attention", 4096)
HALF = {"dtype": "bfloat16"}
LONG = AttentionCase("topk_attention", 32768)
LARGE_K = (256, 512, 1024, 2048, 3000, 4096)
DECODING = 16  # queries; more of them go another way


class TopkAttention(AttentionOp):
    name = "topk_attention"
    labels: ClassVar = LABELS | {
        "full_product": "topk_attention, every score exact",
        "no_tail": "topk_attention without a tail",
    }

    def __init__(self) -> None:
        self.remarks: dict[AttentionCase, str] = {}

    def ours(self, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        options = rule(case)
        if case.key_index:
            options["key_index"] = sparse_attn.KeyIndex.of(tensors[1].detach())
        if case.tail != "none":
            options["tail"] = case.tail
        return lambda q, k, v: sparse_attn.topk_attention(q, k, v, case.top_k, **options)

    def plain(self, contender: str, case: AttentionCase, tensors: Triple) -> contenders.Forward:
        if contender == "full_product":
            ours = self.ours(case, tensors)

            def without_bounds(*leaves: Tensor) -> Tensor:
                with selection_by_bounds(False):
                    return ours(*leaves)

            return without_bounds
        if contender == "no_tail":
            return self.ours(replace(case, tail="none"), tensors)
        return contenders.plain_topk(contender, case)

    def problem(self, contender: str, case: AttentionCase) -> str | None:
        if contender == "full_product":
            return extension.load_error
        return super().problem(contender, case)

    def used(self, contender: str, case: AttentionCase, tensors: Triple) -> Tensor | None:
        if contender in self.dense:
            return None
        if contender in PLAIN:
            return contenders.plain_indices(contender, case, *tensors[:2])
        return select(case, tensors)

    def check(self, contender, case, inputs, work) -> None:
        if contender == "full_product":
            self.check_same_bits(case, inputs)
            return
        if contender == "no_tail":
            case = replace(case, tail="none")
        indices = self.used(contender, case, inputs)
        if indices is not None:
            correctness.check_selection(contender, case, indices, inputs)
        correctness.check_attention(contender, case, work, indices)
        if contender == "ours" and case.queries <= DECODING:
            self._check_alone(case, inputs)

    def _check_alone(self, case: AttentionCase, tensors: Triple) -> None:
        query, key, value = (t.detach() for t in tensors)
        options = rule(case) | {"return_lse": True, "return_indices": True}
        index = {"key_index": sparse_attn.KeyIndex.of(key)} if case.key_index else {}
        longer = torch.cat((query, query[:, :, :1].expand(-1, -1, DECODING, -1)), dim=2)
        few = sparse_attn.topk_attention(query, key, value, case.top_k, **options, **index)
        many = sparse_attn.topk_attention(longer, key, value, case.top_k, **options)
        assert isinstance(few, tuple)
        assert isinstance(many, tuple)
        correctness.check_alone("ours", case, few, many)

    def check_same_bits(self, case: AttentionCase, inputs: Triple) -> None:
        """Selection by bounds and by the full product give the same bits; remarks what the bounds left."""
        results = []
        for use in (False, None):
            with torch.no_grad(), selection_by_bounds(use) as counts:
                results.append(
                    sparse_attn.topk_attention(
                        *inputs, case.top_k, return_lse=True, return_indices=True, **rule(case)
                    )
                )
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            raise WrongResult(f"selection by bounds differs from the full product: {case}")
        self.remarks[case] = said_of_bounds(counts)

    def remark(self, case: AttentionCase) -> str:
        return self.remarks.get(case, "")

    def comparisons(self, quick: bool) -> list[Comparison]:
        both = {"direction": "both"}
        rows = [
            Comparison(BASE, (*PLAIN, *DENSE, "full_product"), {"plain": 25}),
            Comparison(replace(BASE, **HALF), (*PLAIN, *DENSE, "full_product")),
            Comparison(replace(BASE, length=8192), (*DENSE, "full_product"), {"sdpa": 1.0}),
            Comparison(replace(BASE, length=8192, **HALF), (*DENSE, "full_product"), {"sdpa": 1 / 1.3}),
            Comparison(replace(BASE, **both), ("plain_tuned", "sdpa"), {"sdpa": 1.0}),
            Comparison(replace(BASE, **both, **HALF), ("sdpa",)),
        ]
        rows = with_targets_alone(rows) if quick else rows
        return [*rows, *_decoding(quick), *on_real_inputs(rows), *_know_before_use(), *_tails(quick)]

    def scaling(self) -> dict[str, list[AttentionCase]]:
        lengths = (1024, 2048, 4096, 8192, 16384, 32768)
        curve = [replace(BASE, length=n) for n in lengths]
        return {"ours": curve, "sdpa": curve[:-1]}  # the dense rival stops where one call takes over a second

    def peaks(self, quick: bool) -> list[Peak]:
        first = Peak(LONG, target_mb=400)
        return [first] if quick else [first, Peak(replace(LONG, direction="both")), Peak(LONG, "sdpa")]

    def overhead(self) -> tuple[AttentionCase, float]:
        return replace(BASE, length=16), 60


def _decoding(quick: bool) -> list[Comparison]:
    """One step with a cache, without and with a key index; the note has the bytes of the keys, read once."""
    step = replace(BASE, length=8192, query_length=1)
    wide = replace(step, length=32768, heads=32, kv_heads=8, head_dim=128, top_k=256)
    cases = [
        (step, 1.0, 1.0),
        (replace(step, top_k=256), 1.0, 1.0),
        (replace(step, length=65536, top_k=256), 1.5, 4.0),
        (wide, 1.0, 6.0),
        (replace(wide, **HALF), 1.0, 6.0),
        (replace(step, batch=8, heads=9, kv_heads=3, top_k=256), 1.0, 3.0),
    ]
    rows = []
    for case, without, with_index in cases[:1] if quick else cases:
        keys = case.batch * case.kv_heads * case.length
        size = 2 if case.dtype == "bfloat16" else 4
        grouped = ("sdpa_rows",) if case.heads != case.kv_heads else ()
        for index, target, each in (
            (False, without, case.head_dim * size),
            (True, with_index, case.head_dim + 12),
        ):
            note = f"one decoding step; reads {keys * each / 1e6:.0f} MB of keys"
            rows.append(
                Comparison(replace(case, key_index=index), ("sdpa", *grouped), {"sdpa": target}, note=note)
            )
    return rows


def _tails(quick: bool) -> list[Comparison]:
    """What the keys that are left out cost where they count, too; the target is 1.3 of the call without them."""
    cases = [replace(BASE, tail=tail) for tail in ("mean", "blocks")]
    if not quick:
        long = replace(BASE, length=8192)
        more = (
            replace(long, top_k=1024),
            replace(BASE, direction="both"),
            replace(BASE, top_k=512, direction="both"),
        )
        cases += [replace(case, tail=tail) for case in (long, *more) for tail in ("mean", "blocks")]
    return [
        Comparison(
            case, ("no_tail", "sdpa"), {"no_tail": 1 / 1.3}, section="know_before_use", note="tail", rounds=5
        )
        for case in cases
    ]


def _know_before_use() -> list[Comparison]:
    """Where it pays little or nothing, and the options that change the price; always against dense SDPA."""
    gqa = replace(BASE, kv_heads=2)
    rows = [
        *((replace(BASE, length=n), "short") for n in (64, 128, 256, 512, 1024)),
        *((replace(BASE, length=n, direction="both"), "short, training") for n in (256, 1024)),
        (replace(BASE, length=2048, dtype="bfloat16"), ""),
        *((replace(BASE, top_k=k), "large K") for k in LARGE_K),
        *((replace(BASE, top_k=k, direction="both"), "large K, training") for k in LARGE_K),
        (replace(BASE, top_k=1024, **HALF), "large K"),
        (replace(BASE, length=1024, top_k=1024), "top_k ≥ T, the same result as dense"),
        (replace(BASE, head_dim=128), "wide heads"),
        (replace(BASE, window=32, sinks=4), "a third of the budget is fixed"),
        (gqa, "GQA, a selection per query head"),
        (replace(gqa, share="kv"), "GQA, a selection per key head: ranks by attention mass"),
        (replace(gqa, share="all"), "one selection for all heads: ranks by attention mass"),
        (replace(BASE, inputs="ascending"), "worst order: every later key is better"),
    ]
    return [
        Comparison(case, ("sdpa",), section="know_before_use", note=note, rounds=7) for case, note in rows
    ]


OP = TopkAttention()
