"""`variable_width_cross_entropy` against the dense head, fused and not, and the approximate adaptive softmax.

Vocabulary, bands and token ids are those of the embedding; the hidden states are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from sparse_attn.bench.bands import (
    BAND_SIZES,
    DIM,
    KINDS,
    VOCABULARY,
    WIDTHS,
    BandCase,
    BandOp,
    Bands,
    make,
)
from sparse_attn.bench.correctness import assert_near
from sparse_attn.bench.registry import Comparison, Peak, Work, WrongResult

TOKENS, CHECKED = 4096, 256
TARGETS = {
    "fused_dense": 5.0,
    "adaptive": 1 / 1.5,
}  # rival → the least acceptable time over ours, both directions
HALF = ("fused_dense", "adaptive")  # the rivals in bfloat16
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of the largest magnitude
MEMORY_TARGET = 10.0  # peak memory of "dense" over ours
Inputs = tuple[Bands, Tensor]  # and the hidden states [N, D]


class VariableWidthCrossEntropy(BandOp):
    name = "variable_width_cross_entropy"
    setting = f"N={TOKENS}, V={VOCABULARY}, D={DIM}, bands {BAND_SIZES} of widths {WIDTHS}, float32 unless said, mean"
    labels: ClassVar = {
        "ours": "sparse_attn",
        "fused_dense": "F.linear_cross_entropy, dense head",
        "dense": "F.linear + F.cross_entropy, dense head",
        "bands": "eager bands + F.cross_entropy",
        "adaptive": "AdaptiveLogSoftmaxWithLoss (not exact)",
    }

    def problem(self, contender: str, case: BandCase) -> str | None:
        if contender == "fused_dense" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        return None

    def inputs(self, case: BandCase) -> Inputs:
        return _inputs(case.ids, case.dtype)

    def prepare(self, contender: str, case: BandCase, inputs: Inputs) -> Work:
        return _work(contender, *inputs)

    def check(self, contender: str, case: BandCase, inputs: Inputs, work: Work) -> None:
        """Loss and gradients of a few tokens against the dense head's in float64."""
        bands, hidden = inputs
        few = _head(bands, CHECKED), hidden[:CHECKED]
        work = _work(contender, *few)
        leaves = tuple(t.detach().requires_grad_() for t in work.leaves)
        loss = work.forward(*leaves)
        grads = torch.autograd.grad(loss, leaves)
        if contender == "adaptive":  # another model: only that it computes something
            if not loss.isfinite():
                raise WrongResult(f"{contender}: the loss is {loss.item()}")
            return
        exact = _work("dense" if contender in ("dense", "fused_dense") else "bands", *few)
        wide = tuple(t.detach().double().requires_grad_() for t in exact.leaves)
        want = exact.forward(*wide)
        assert_near(f"{contender}: loss of {case}", loss, want, TOLERANCE[case.dtype])
        for got, true in zip(grads, torch.autograd.grad(want, wide), strict=True):
            assert_near(f"{contender}: gradient of {case}", got, true, TOLERANCE[case.dtype])

    def comparisons(self, quick: bool) -> list[Comparison]:
        options = {"rounds": 1 if quick else 5, "least": 1 if quick else 3, "seconds": 60}
        rows = []
        for kind in KINDS:
            forward, both = BandCase(self.name, kind), BandCase(self.name, kind, "both")
            half = replace(both, dtype="bfloat16")
            rows += [Comparison(forward, tuple(self.labels)[1:], {}, **options)]
            rows += [Comparison(both, tuple(self.labels)[1:], TARGETS, **options)]
            rows += [Comparison(half, HALF, TARGETS, **options)]
        return rows

    def warm_up(self, contender: str, case: BandCase) -> Work:
        bands, hidden = self.inputs(case)
        return _work(contender, _head(bands, 8), hidden[:8])

    def peaks(self, quick: bool) -> list[Peak]:
        case = BandCase(self.name, "zipf", "both")
        targets = {"dense": MEMORY_TARGET}
        return [] if quick else [Peak(case, name, target=targets.get(name)) for name in self.labels]


@lru_cache(maxsize=2)
def _inputs(kind: str, dtype: str) -> Inputs:
    """Hidden states that give logits of about unit variance."""
    as_type = getattr(torch, dtype)
    hidden = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2)) / DIM**0.5
    bands = _head(make(kind, 16384), TOKENS)
    tables, projections = (tuple(t.to(as_type) for t in part) for part in (bands.tables, bands.projections))
    return replace(bands, tables=tables, projections=projections), hidden.to(as_type)


def _head(bands: Bands, count: int) -> Bands:
    """The same with the first ids alone."""
    return replace(bands, ids=bands.ids[:count], ranks=bands.ranks[:count])


def _work(name: str, bands: Bands, hidden: Tensor) -> Work:
    """The hidden states are the first leaf, then comes what is trained of the head."""
    ids, ranks = bands.ids, bands.ranks
    if name in ("dense", "fused_dense"):
        with torch.no_grad():
            table = bands.dense(bands.leaves)
        if name == "dense":
            return Work(lambda h, w: F.cross_entropy(F.linear(h, w), ids), (hidden, table))
        return Work(lambda h, w: F.linear_cross_entropy(h, w, ids), (hidden, table))
    if name == "adaptive":
        head = _adaptive().to(hidden.dtype)
        return Work(_functional(head, ranks), (hidden, *head.parameters()))
    if name == "bands":

        def eager(h: Tensor, *leaves: Tensor) -> Tensor:
            parts = zip(*bands.split(leaves), strict=True)
            logits = [h @ t.t() if p is None else (h @ p) @ t.t() for t, p in parts]
            return F.cross_entropy(torch.cat(logits, 1), ranks)

        return Work(eager, (hidden, *bands.leaves))

    def ours(h: Tensor, *leaves: Tensor) -> Tensor:
        return sparse_attn.variable_width_cross_entropy(
            h, ids, *bands.split(leaves), bands.token_band, bands.token_row
        )

    return Work(ours, (hidden, *bands.leaves))


def _adaptive() -> torch.nn.AdaptiveLogSoftmaxWithLoss:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cutoffs = [BAND_SIZES[0], BAND_SIZES[0] + BAND_SIZES[1]]
        return torch.nn.AdaptiveLogSoftmaxWithLoss(DIM, VOCABULARY, cutoffs, div_value=4.0)


def _functional(head: torch.nn.AdaptiveLogSoftmaxWithLoss, ranks: Tensor) -> Callable[..., Tensor]:
    """Its loss, as a function of the hidden states and of the parameters."""
    names = [n for n, _ in head.named_parameters()]

    def loss(h: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, named, (h, ranks)).loss

    return loss


OP = VariableWidthCrossEntropy()
