"""Before anything is timed: does the contender compute what it should, on these very inputs?

Outputs and gradients are compared with float64 on a few sampled queries, so that the check costs little at
any length: gradients by a grad_out that is zero at all other queries. Selections are compared by their scores,
since which of two equal scores is chosen may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import PLAIN_SELECTIONS, Forward, select

SAMPLED = 24
# Relative to the largest magnitude of what is compared. Half types round products and outputs.
OUTPUT_TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}
# Ours accumulates scores in float32 for every dtype; plain PyTorch rounds them to the dtype before choosing.
SCORE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}


class WrongResult(AssertionError):
    """A contender computed something else; its time would mean nothing."""


def check(name: str, case: Case, forward: Forward, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raises WrongResult unless the contender's result (and its gradients, if timed) are right."""
    if name == "scores":
        return
    rows = _sample(tensors[0].shape[2])
    if case.op == "topk_select":
        _check_selection(name, case, forward(*tensors), tensors, rows)
        return
    indices = _indices_used(name, case, tensors)
    if indices is not None and case.op == "topk_attention":
        _check_selection(name, case, indices, tensors, rows)
    leaves = tuple(t.detach().requires_grad_(case.backward) for t in tensors)
    wide = tuple(t.detach().double().requires_grad_(case.backward) for t in tensors)
    with torch.set_grad_enabled(case.backward):  # as when it is timed
        out = forward(*leaves)
    expected = _oracle(case, wide, rows, indices)
    _compare(f"{name}: output of {case}", out[:, :, rows], expected, OUTPUT_TOLERANCE[case.dtype])
    if case.backward:
        grad_rows = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grad_out = torch.zeros_like(out).index_copy(2, rows, grad_rows)
        grads = torch.autograd.grad(out, leaves, grad_out)
        wanted = torch.autograd.grad(expected, wide, grad_rows.double())
        for what, grad, want in zip(("query", "key", "value"), grads, wanted, strict=True):
            _compare(f"{name}: gradient of {what} of {case}", grad, want, 4 * OUTPUT_TOLERANCE[case.dtype])


def _sample(length: int) -> Tensor:
    """The first and the last queries and some between."""
    return torch.linspace(0, length - 1, min(SAMPLED, length)).to(torch.int64).unique()


def _indices_used(name: str, case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor | None:
    """What the contender attends to: int [B, G, Tq, K], or None for all keys."""
    if name in ("sdpa", "flex"):
        return None
    if name in PLAIN_SELECTIONS and case.op == "topk_attention":
        with torch.no_grad():
            return PLAIN_SELECTIONS[name](*tensors[:2], case.top_k)[1]
    return select(case, tensors)


def _scores(case: Case, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Scaled scores of the sampled queries, −inf where causally hidden: [B, Hq, R, T]."""
    key = key.repeat_interleave(case.heads // case.kv_heads, dim=1)
    scores = query[:, :, rows] @ key.transpose(-1, -2) * case.head_dim**-0.5
    offset = key.shape[2] - query.shape[2]
    hidden = torch.arange(key.shape[2]) > rows.unsqueeze(-1) + offset
    return scores.masked_fill(hidden, -torch.inf)


def _oracle(case: Case, wide: tuple[Tensor, ...], rows: Tensor, indices: Tensor | None) -> Tensor:
    """Softmax attention of the sampled queries to their indices (None: to all visible keys), in float64."""
    query, key, value = wide
    scores = _scores(case, query, key, rows)
    if indices is not None:
        scores = scores.masked_fill(~_chosen(case, indices, rows, key.shape[2]), -torch.inf)
    value = value.repeat_interleave(case.heads // case.kv_heads, dim=1)
    return scores.softmax(-1) @ value


def _chosen(case: Case, indices: Tensor, rows: Tensor, length: int) -> Tensor:
    """bool [B, Hq, R, T] of int [B, G, Tq, K]."""
    index = indices[:, :, rows].to(torch.int64)
    index = torch.where((index >= 0) & (index < length), index, length)  # the empty slots: a column to drop
    chosen = torch.zeros((*index.shape[:3], length + 1), dtype=torch.bool).scatter(3, index, True)
    return chosen[..., :length].repeat_interleave(case.heads // indices.shape[1], dim=1)


def _check_selection(
    name: str, case: Case, indices: Tensor, tensors: tuple[Tensor, ...], rows: Tensor
) -> None:
    """The chosen scores are the largest; shared selections rank by mass and are left to the tests."""
    if case.share != "none":
        return
    query, key = (t.detach().double() for t in tensors[:2])
    scores = _scores(case, query, key, rows)
    chosen = _chosen(case, indices, rows, key.shape[2])
    if case.window or case.sinks:  # these come first; the rest of the budget goes to the best of the others
        at = torch.arange(key.shape[2])
        last = rows.unsqueeze(-1) + key.shape[2] - query.shape[2]
        kept = (at < case.sinks) | ((at > last - case.window) & (at <= last))
        scores = scores.masked_fill(kept & (scores > -torch.inf), torch.finfo(torch.float64).max)
    best = scores.topk(indices.shape[3], dim=-1).values
    ours = scores.masked_fill(~chosen, -torch.inf).topk(indices.shape[3], dim=-1).values
    if not torch.equal(best.isinf(), ours.isinf()):
        raise WrongResult(f"{name}: selection of {case}: rows hold a wrong number of keys")
    finite = ~best.isinf() & (best < torch.finfo(torch.float64).max)
    _compare(f"{name}: selection of {case}", ours[finite], best[finite], SCORE_TOLERANCE[case.dtype])


def _compare(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if want.numel() == 0:
        return
    error = (got.double() - want).abs().max().item() / max(1e-30, want.abs().max().item())
    if not error <= tolerance:  # also catches NaN
        raise WrongResult(f"{what}: relative error {error:.2e}, at most {tolerance:.0e} is right")
