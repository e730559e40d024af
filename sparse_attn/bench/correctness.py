"""Before anything is timed: does the contender compute what it should, on these very inputs?

Outputs and gradients are compared with float64 on a few sampled queries, so that the check costs little at
any length: gradients by a grad_out that is zero at all other queries. Selections are compared by their scores,
since which of two equal scores is chosen may differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn.bench.attention_case import AttentionCase
from sparse_attn.bench.registry import Work, WrongResult
from sparse_attn.ops.tail import BLOCK

SAMPLED = 24
# Relative to the largest magnitude of what is compared. Half types round products and outputs.
OUTPUT_TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}
# Ours accumulates scores in float32 for every dtype; plain PyTorch rounds them to the dtype before choosing.
SCORE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}


def assert_near(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative to the largest magnitude; NaN is never near."""
    if want.numel() == 0:
        return
    scale = max(1e-30, want.abs().max().item())
    error = (got.double() - want.double()).abs().max().item() / scale
    if not error <= tolerance:
        raise WrongResult(f"{what}: relative error {error:.2e}, at most {tolerance:.0e} is right")


def sample(length: int, device: torch.device | str = "cpu") -> Tensor:
    """The first and the last queries and some between."""
    return torch.linspace(0, length - 1, min(SAMPLED, length)).to(torch.int64).unique().to(device)


def check_attention(
    name: str,
    case: AttentionCase,
    work: Work,
    indices: Tensor | None,
    tolerance: float | None = None,
    first: Tensor | None = None,
) -> None:
    """The output of sampled queries, and the gradients of those alone, against float64 over `indices`.

    Args:
        indices: int [B, G, Tq, K]; None: all visible keys.
        tolerance: of the output; gradients get four times as much. None: as the dtype asks.
        first: int [Tq]: the first key that each query sees. None: the first of all.
    """
    tolerance = tolerance or OUTPUT_TOLERANCE[case.dtype]
    gradients = case.direction != "forward"
    rows = sample(case.queries, work.leaves[0].device)
    leaves = tuple(t.detach().requires_grad_(gradients) for t in work.leaves)
    wide = tuple(t.detach().double().requires_grad_(gradients) for t in work.leaves)
    with torch.set_grad_enabled(gradients):  # as when it is timed
        out = work.forward(*leaves)
        expected = attention(case, wide, rows, indices, first)
    assert_near(f"{name}: output of {case}", out[:, :, rows], expected, tolerance)
    if gradients:
        generator = torch.Generator().manual_seed(1)
        grad_rows = torch.randn(expected.shape, generator=generator).to(out.device, out.dtype)
        grad_out = torch.zeros_like(out).index_copy(2, rows, grad_rows)
        grads = torch.autograd.grad(out, leaves, grad_out)
        wanted = torch.autograd.grad(expected, wide, grad_rows.double())
        for what, grad, want in zip(("query", "key", "value"), grads, wanted, strict=True):
            assert_near(f"{name}: gradient of {what} of {case}", grad, want, 4 * tolerance)


def attention(
    case: AttentionCase,
    wide: tuple[Tensor, ...],
    rows: Tensor,
    indices: Tensor | None,
    first: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the sampled queries to their indices (None: to all visible keys): [B, Hq, R, Dv]."""
    query, key, value = wide
    scores = _scores(case, query, key, rows)
    if indices is not None and case.tail != "none":
        return _with_tail(case, wide, rows, scores, _chosen(case, indices, rows, key.shape[2]))
    if indices is not None:
        scores = scores.masked_fill(~_chosen(case, indices, rows, key.shape[2]), -torch.inf)
    if first is not None:
        unseen = torch.arange(key.shape[2], device=rows.device) < first[rows].unsqueeze(-1)
        scores = scores.masked_fill(unseen, -torch.inf)
    weights = scores.softmax(-1).unflatten(1, (case.kv_heads, -1))
    return (weights @ value.unsqueeze(2)).flatten(1, 2)


def _with_tail(
    case: AttentionCase, wide: tuple[Tensor, ...], rows: Tensor, scores: Tensor, chosen: Tensor
) -> Tensor:
    """The same where what is left out counts, too; scores and chosen [B, Hq, R, T]."""
    _, key, value = wide
    value = value.repeat_interleave(case.heads // case.kv_heads, dim=1)
    left = (scores > -torch.inf) & ~chosen
    if case.tail == "mean":
        mass = scores.softmax(-1)
        mean = left.double() @ value / left.sum(-1, keepdim=True).clamp(min=1)
        outside = mass.masked_fill(~left, 0.0).sum(-1, keepdim=True)
        return mass.masked_fill(~chosen, 0.0) @ value + outside * mean
    count = key.shape[2] // BLOCK
    keys, values = (
        t[:, :, : count * BLOCK].unflatten(2, (count, BLOCK)).mean(3) for t in (key, value)
    )  # [B, H, M, D]
    seen, left = (t[..., : count * BLOCK].unflatten(-1, (count, BLOCK)) for t in (scores > -torch.inf, left))
    times = left.sum(-1) * seen.all(-1)
    coarse = _scores(replace(case, causal=False), wide[0], keys, rows)
    coarse = torch.where(times > 0, coarse + times.clamp(min=1).double().log(), -torch.inf)
    weights = torch.cat((scores.masked_fill(~chosen, -torch.inf), coarse), dim=-1).softmax(-1)
    return weights @ torch.cat((value, values), dim=2)


def check_selection(
    name: str,
    case: AttentionCase,
    indices: Tensor,
    tensors: tuple[Tensor, ...],
    tolerance: float | None = None,
) -> None:
    """The chosen scores are the largest; shared selections rank by mass and are left to the tests."""
    if case.share != "none":
        return
    rows = sample(case.queries, indices.device)
    query, key = (t.detach().double() for t in tensors[:2])
    scores = _scores(case, query, key, rows)
    chosen = _chosen(case, indices, rows, key.shape[2])
    if case.window or case.sinks:  # these come first; the rest of the budget goes to the best of the others
        at = torch.arange(key.shape[2], device=rows.device)
        last = rows.unsqueeze(-1) + key.shape[2] - query.shape[2]
        kept = (at < case.sinks) | ((at > last - case.window) & (at <= last))
        scores = scores.masked_fill(kept & (scores > -torch.inf), torch.finfo(torch.float64).max)
    best = scores.topk(indices.shape[3], dim=-1).values
    ours = scores.masked_fill(~chosen, -torch.inf).topk(indices.shape[3], dim=-1).values
    if not torch.equal(best.isinf(), ours.isinf()):
        raise WrongResult(f"{name}: selection of {case}: rows hold a wrong number of keys")
    finite = ~best.isinf() & (best < torch.finfo(torch.float64).max)
    what = f"{name}: selection of {case}"
    assert_near(what, ours[finite], best[finite], tolerance or SCORE_TOLERANCE[case.dtype])


def check_alone(name: str, case: AttentionCase, few: tuple[Tensor, ...], many: tuple[Tensor, ...]) -> None:
    """Results for few queries (decoding) are those that the same queries have among many, to the bit.

    Where 512 keys or more are kept, many queries may go by dense tiles, which sum in another order: then the
    selection has the same bits, output and LSE are as near as two such sums are.
    """
    for what, got, want in zip(("output", "lse", "indices"), few, many, strict=True):
        want = want[:, :, : case.queries]
        if case.top_k >= 512 and what != "indices":
            assert_near(f"{name}: {what} of {case} among others", got, want, OUTPUT_TOLERANCE[case.dtype])
        elif not torch.equal(got, want):
            raise WrongResult(f"{name}: {what} of {case} is not what these queries get among others")


def _scores(case: AttentionCase, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Scaled scores of the sampled queries, −inf where causally hidden: [B, Hq, R, T]."""
    few = query[:, :, rows].unflatten(1, (case.kv_heads, -1))
    scores = (few @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * case.head_dim**-0.5
    if not case.causal:
        return scores
    offset = key.shape[2] - query.shape[2]
    unseen = torch.arange(key.shape[2], device=rows.device) > rows.unsqueeze(-1) + offset
    return scores.masked_fill(unseen, -torch.inf)


def _chosen(case: AttentionCase, indices: Tensor, rows: Tensor, length: int) -> Tensor:
    """bool [B, Hq, R, T] of int [B, G, Tq, K]."""
    index = indices[:, :, rows].to(torch.int64)
    index = torch.where((index >= 0) & (index < length), index, length)  # the empty slots: a column to drop
    chosen = torch.zeros((*index.shape[:3], length + 1), dtype=torch.bool, device=rows.device)
    chosen = chosen.scatter(3, index, True)[..., :length]
    return chosen.repeat_interleave(case.heads // indices.shape[1], dim=1)
