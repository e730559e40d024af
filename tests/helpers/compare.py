"""How results are compared with the oracle. Each comparison says what it allows and why."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers import oracle

# Underflow: float32 products below the normal range may be flushed to 0.
_TINY = 2.0**-126


def accumulation(dtype: torch.dtype) -> float:
    """The rounding unit of a wing's arithmetic: half types accumulate in float32."""
    return 2.0**-52 if dtype == torch.float64 else 2.0**-24


def assert_well_formed(indices: Tensor, query: Tensor, key: Tensor, top_k: int, **options) -> None:
    """The contract whatever the scores: shape, int32, unique, ascending, −1 last, visible, full."""
    seen = oracle.visible(query, key, **options)
    count = oracle.groups(query, key, options.get("share", "none"))
    seen = oracle.first_of_group(seen, count)
    length, width = key.shape[2], min(top_k, key.shape[2])
    assert indices.dtype == torch.int32
    assert indices.shape == (query.shape[0], count, query.shape[2], width)
    assert indices.is_contiguous()
    if indices.numel() == 0:
        return
    filled = indices >= 0
    assert bool(((indices >= -1) & (indices < length)).all()), "index out of range"
    sizes = filled.sum(-1)
    wanted = seen.sum(-1).clamp(max=width)
    assert torch.equal(sizes, wanted), f"rows keep {sizes.tolist()} keys, want {wanted.tolist()}"
    assert torch.equal(filled, torch.arange(width) < sizes.unsqueeze(-1)), "an empty slot is not last"
    steps = indices.diff(dim=-1)
    assert bool((steps > 0)[filled[..., 1:]].all()), "indices are not ascending and unique"
    chosen = is_chosen(indices, length)
    assert not bool((chosen & ~seen).any()), "a hidden key was chosen"
    kept = oracle.forced(query, key, **options) & seen
    assert bool(chosen[kept].all()), "a key of the window or the sinks is missing"


def is_chosen(indices: Tensor, length: int) -> Tensor:
    """indices [B, G, Tq, K] → bool [B, G, Tq, Tk]."""
    chosen = torch.zeros(*indices.shape[:3], length + 1, dtype=torch.bool)
    places = indices.long().where((indices >= 0) & (indices < length), length)
    return chosen.scatter_(-1, places, True)[..., :length]


def rank_errors(
    query: Tensor, key: Tensor, *, scale=None, share: str = "none", softcap=None, sink_logits=None, **options
) -> Tensor:
    """How far a wing's rank may lie from the true one, float64 [B, G, Tq, Tk].

    A score is a sum of D products and two more roundings: (D + 3) units of Σ|q·k|; its cap, whose slope is at most
    1, makes 8 more of what it gives. A mass is a sum of
    exponentials of score − LSE, so the scores' errors and the rounding of that difference make it relative.
    """
    unit = accumulation(query.dtype)
    sizes = oracle.scores(query.abs(), key.abs(), 1.0 if scale is None else abs(scale))
    if scale is None:
        sizes = sizes / math.sqrt(query.shape[3])
    errors = (query.shape[3] + 3) * unit * sizes + query.shape[3] * _TINY
    count = oracle.groups(query, key, share)
    if count == query.shape[1]:
        return errors
    seen = oracle.visible(query, key, **options)
    each = oracle.scores(query, key, scale, softcap)
    if softcap is not None:
        errors = errors + 8 * unit * each.abs()
    each = each.masked_fill(~seen, -math.inf)
    normaliser = torch.cat((each, oracle.sink_column(each, sink_logits)), dim=-1).logsumexp(-1, keepdim=True)
    spread = (normaliser - each).masked_fill(~seen, 0.0).abs()
    worst = (2 * errors + unit * (spread + 16)).masked_fill(~seen, 0.0).amax(-1, keepdim=True)
    relative = worst.unflatten(1, (count, -1)).amax(2).expm1()
    scoring = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    masses = oracle.ranks(query, key, share=share, **scoring, **options)
    return masses * relative + query.shape[1] * _TINY


def assert_best(indices: Tensor, query: Tensor, key: Tensor, top_k: int, **options) -> None:
    """Well formed, and no key left out is better than a chosen one by more than rounding explains."""
    assert_well_formed(indices, query, key, top_k, **options)
    if indices.numel() == 0:
        return
    rank = oracle.ranks(query, key, **options)
    error = rank_errors(query, key, **options)
    seen = oracle.first_of_group(oracle.visible(query, key, **options), indices.shape[1])
    assert_highest(indices, rank, error, seen, oracle.forced(query, key, **options))


def assert_highest(indices: Tensor, rank: Tensor, error: Tensor, seen: Tensor, kept: Tensor) -> None:
    """No key left out ranks higher than a chosen one by more than the errors [B, G, Tq, Tk] of both."""
    chosen = is_chosen(indices, rank.shape[-1])
    best_left_out = (rank - error).masked_fill(~seen | chosen | kept, -math.inf).amax(-1)
    worst_chosen = (rank + error).masked_fill(~chosen | kept, math.inf).amin(-1)
    excess = best_left_out - worst_chosen
    assert bool((excess <= 0).all()), (
        f"a better key was left out, by {excess.max().item():.3g} beyond rounding"
    )


def assert_identical(indices: Tensor, query: Tensor, key: Tensor, top_k: int, **options) -> None:
    """For inputs whose scores are exact: the very indices of the oracle, ties included."""
    assert_well_formed(indices, query, key, top_k, **options)
    expected = oracle.topk_select(query, key, top_k, **options)
    wrong = (indices != expected).any(-1).nonzero()
    assert not len(wrong), (
        f"{len(wrong)} rows differ; at {wrong[0].tolist()} got {indices[tuple(wrong[0])].tolist()}, "
        f"want {expected[tuple(wrong[0])].tolist()}"
    )


def assert_close(actual: Tensor, expected: Tensor, name: str, *, units: float | None = None) -> None:
    """Within `units` roundings, in the result's dtype, of the largest value; −inf and NaN must agree.

    By default 16 in float32 and float64, the end of a chain of such operations (measured: up to 9, where scores
    of 30 stand in the exponent), and 1 in the half types, which are rounded once, at the end.
    """
    units = units or (16 if actual.dtype in (torch.float32, torch.float64) else 1)
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, want {list(expected.shape)}"
    special = ~expected.isfinite()
    torch.testing.assert_close(
        actual.double()[special], expected.double()[special], equal_nan=True, rtol=0, atol=0
    )
    actual, expected, resolution = actual[~special], expected[~special], torch.finfo(actual.dtype).eps
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = units * resolution * max(1e-30, expected.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3g} is more than {allowed:.3g}"


def pytorch_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scale: float | None = None
) -> Tensor:
    """PyTorch's own attention in the inputs' dtype, with a boolean mask made from the indices."""
    mask = oracle.multiplicity(query, key, indices) > 0
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def pytorch_steps(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scale: float | None = None
) -> Tensor:
    """The same of PyTorch's single steps in the inputs' dtype: gather, product, softmax, product."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows = indices.repeat_interleave(query.shape[1] // indices.shape[1], dim=1).clamp(min=0).long()
    batch, head = torch.arange(query.shape[0]).view(-1, 1, 1, 1), torch.arange(query.shape[1]).view(-1, 1, 1)
    keys, values = (
        t.repeat_interleave(query.shape[1] // t.shape[1], 1)[batch, head, rows] for t in (key, value)
    )
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1) * scale
    weights = scores.masked_fill(indices < 0, -math.inf).softmax(-1)
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def assert_within_budget(ours: Tensor, pytorchs: Tensor, exact: Tensor, name: str, *others: Tensor) -> None:
    """|ours − fp64| ≤ 1.5 · |PyTorch in the same dtype − fp64| + ε, for the mean and for the largest error.

    Of several results of PyTorch's the worst counts.
    The mean is the sharp one: its ε is an eighth of a rounding. The largest error is one element's luck, in
    float32 of a chain of roundings: its ε is 4 roundings of the largest value there, and a half one, the
    rounding of the result itself, in the half types.
    """
    assert ours.dtype == pytorchs.dtype, f"{name}: {ours.dtype}, PyTorch has {pytorchs.dtype}"
    mine, *theirs = ((t.double() - exact).abs() for t in (ours, pytorchs, *others))
    rounding = torch.finfo(ours.dtype).eps
    for kind, measure, roundings in (
        ("mean", torch.mean, 1 / 8),
        ("largest", torch.amax, 4 if ours.dtype == torch.float32 else 1 / 2),
    ):
        error, yardstick = measure(mine), max(measure(t) for t in theirs)
        allowed = 1.5 * yardstick + roundings * rounding * measure(exact.abs())
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3g}, PyTorch's {yardstick:.3g}, allowed {allowed:.3g}"
        )
