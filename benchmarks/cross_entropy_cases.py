"""The exact loss's benchmark: targets, contenders, and the check before any of them is timed.

Vocabulary, bands and token ids are those of the embedding's benchmark; the hidden states are random.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks import embedding_cases
from benchmarks.correctness import WrongResult
from benchmarks.embedding_cases import BAND_SIZES, DIM, KINDS, VOCABULARY, WIDTHS, Inputs, why_not

__all__ = ["KINDS", "LABELS", "MEMORY_TARGET", "SETTING", "TARGETS", "check", "make", "prepare", "problem"]

TOKENS = 4096
SETTING = f"N={TOKENS}, V={VOCABULARY}, D={DIM}, bands {BAND_SIZES} of widths {WIDTHS}, float32, mean"

LABELS = {
    "ours": "sparse_attn",
    "fused_dense": "F.linear_cross_entropy, dense head",
    "dense": "F.linear + F.cross_entropy, dense head",
    "bands": "eager bands + F.cross_entropy",
    "adaptive": "AdaptiveLogSoftmaxWithLoss (not exact)",
}
# contender → the least acceptable time over ours, forward + backward
TARGETS = {"fused_dense": 5.0, "adaptive": 1 / 1.5}
MEMORY_TARGET = 10.0  # peak memory of "dense" over ours


def problem(name: str, kind: str) -> str | None:
    """None if the contender can run, else the reason in one clause."""
    if name == "fused_dense" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return why_not(kind)


@lru_cache(maxsize=2)
def make(kind: str) -> tuple[Inputs, Tensor]:
    """The embedding's inputs, and hidden states [N, D] that give logits of about unit variance."""
    hidden = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2)) / DIM**0.5
    return embedding_cases.make(kind), hidden


def prepare(name: str, kind: str, tokens: int = TOKENS) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(loss of the leaves, the leaves): the hidden states first, then what is trained of the head."""
    inputs, hidden = make(kind)
    hidden, ids, ranks = hidden[:tokens], inputs.ids[:tokens], inputs.ranks[:tokens]
    if name == "dense":
        return lambda h, w: F.cross_entropy(F.linear(h, w), ids), (hidden, inputs.dense())
    if name == "fused_dense":
        return lambda h, w: F.linear_cross_entropy(h, w, ids), (hidden, inputs.dense())
    if name == "adaptive":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cutoffs = [BAND_SIZES[0], BAND_SIZES[0] + BAND_SIZES[1]]
            head = torch.nn.AdaptiveLogSoftmaxWithLoss(DIM, VOCABULARY, cutoffs, div_value=4.0)
        names = [n for n, _ in head.named_parameters()]

        def adaptive(h: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(head, named, (h, ranks)).loss

        return adaptive, (hidden, *head.parameters())
    leaves = (hidden, *inputs.tables, *inputs.projections)
    if name == "bands":

        def bands(h: Tensor, *parameters: Tensor) -> Tensor:
            first, *narrow = parameters[:3]
            parts = zip(narrow, parameters[3:], strict=True)
            return F.cross_entropy(torch.cat([h @ first.t(), *((h @ p) @ t.t() for t, p in parts)], 1), ranks)

        return bands, leaves
    starts = torch.tensor([0, BAND_SIZES[0], BAND_SIZES[0] + BAND_SIZES[1]])
    rank = torch.empty(VOCABULARY, dtype=torch.int64).index_copy(0, inputs.order, torch.arange(VOCABULARY))
    band = inputs.plan.token_band
    row = (rank - starts[band.long()]).to(torch.int32)

    def ours(h: Tensor, *parameters: Tensor) -> Tensor:
        return sparse_attn.variable_width_cross_entropy(
            h, ids, parameters[:3], (None, *parameters[3:]), band, row
        )

    return ours, leaves


def check(name: str, kind: str) -> None:
    """Raises WrongResult unless loss and gradients of 256 tokens equal the dense head's in float64."""
    forward, leaves = prepare(name, kind, 256)
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    loss = forward(*leaves)
    grads = torch.autograd.grad(loss, leaves)
    if name == "adaptive":  # another model: only that it computes something
        if not loss.isfinite():
            raise WrongResult(f"{name}: the loss is {loss.item()}")
        return
    same = "dense" if name in ("dense", "fused_dense") else "bands"
    exact, wide = prepare(same, kind, 256)
    wide = tuple(t.detach().double().requires_grad_() for t in wide)
    want = exact(*wide)
    wanted = torch.autograd.grad(want, wide)
    for what, got, true in zip(
        ("loss", *["gradient"] * len(grads)), (loss, *grads), (want, *wanted), strict=True
    ):
        error = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not error <= 2e-5:  # also catches NaN
            raise WrongResult(f"{name}: {what} on {kind} ids: relative error {error:.2e}")
