"""Attention in float64 beside how far a correct float32 one may be from it, forward and backward.

First-order rounding analysis of the formulas, every sum in the order that is worst: each error is a multiple of what
the sum's absolute values come to. Keys that a query does not attend to never enter, NaN or not.

A soft cap c·tanh(s/c) has the slope 1 − tanh² ≤ 1 and the second derivative 2·tanh·(1 − tanh²)/c, at most 0.77/c: it
never enlarges an error of s. A sink's logit is exact and one more term of the sum, so it enters the LSE, and through
it all weights; it has no value, so of the gradients it enters its own alone, Σ p₀ (∂lse − ∂out·out).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from helpers import oracle
from helpers.compare import accumulation
from torch import Tensor

_TINY = 2.0**-126
UNDERFLOW = 2.0**-120  # of a sum in float32 some of whose terms are below the normal range
Bounded = tuple[Tensor, Tensor]  # the exact value, and the largest error


class Attention:
    """Softmax attention of each query to keys that count `counts` [B, Hq, Tq, Tk] times."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> None:
        self.dtype, self.kv_heads = query.dtype, key.shape[1]
        self.unit = accumulation(query.dtype) * (2 if query.dtype == torch.float64 else 1)
        self.rounding = torch.finfo(query.dtype).eps
        self.scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        share = query.shape[1] // key.shape[1]
        self.query = query.double()
        self.key, self.value = (t.double().repeat_interleave(share, dim=1) for t in (key, value))
        self.finite = all(bool(t.isfinite().all()) for t in (self.query, self.key, self.value))
        self.on = counts > 0
        scores = self._products(self.query, self.key) * self.scale
        self.cap, self.bent = softcap, None  # tanh of scores / cap
        if softcap is not None:
            self.bent = torch.tanh(scores / softcap)
            scores = softcap * self.bent
        scores = scores.masked_fill(~self.on, -math.inf)
        shape = scores.shape
        top = scores.amax(-1, keepdim=True) if shape[-1] else scores.new_full((*shape[:-1], 1), -math.inf)
        self.sinks = sink_logits
        sink = oracle.sink_column(scores, sink_logits)
        top = torch.maximum(top, sink)
        self.alive = top != -math.inf  # [B, Hq, Tq, 1]; NaN is alive
        top = top.masked_fill(~self.alive, 0.0)
        self.weights = torch.where(self.on, counts * (scores - top).exp(), 0.0).masked_fill(~self.alive, 0.0)
        of_sink = (sink - top).exp().masked_fill(~self.alive, 0.0)
        total = (self.weights.sum(-1, keepdim=True) + of_sink).masked_fill(~self.alive, 1.0)
        self.p_sink = of_sink / total  # [B, Hq, Tq, 1]
        self.p = self.weights / total
        self.lse = torch.where(self.alive, total.log() + top, -math.inf)
        many = counts.sum(-1, keepdim=True) + 16 + (sink_logits is not None)
        dim = query.shape[3]
        sizes = (self.query.abs().nan_to_num(0, 0, 0) @ self.key.abs().nan_to_num(0, 0, 0).mT).masked_fill(
            ~self.on, 0
        )
        error = abs(self.scale) * ((dim + 3) * self.unit * sizes + dim * _TINY)
        self.slope, self.slope_error = torch.ones_like(error), torch.zeros_like(error)
        if softcap is not None:
            error = self._bend(error, softcap)
        worst = error.amax(-1, keepdim=True) if shape[-1] else error.new_zeros((*shape[:-1], 1))
        spread = (top - scores).masked_fill(~self.on, 0.0).nan_to_num(0, 0, 0).clamp(0, 1e3)
        log = self.lse.nan_to_num(0, 0, 0).abs()
        self.log_error = worst + self.unit * many + 2.0**-23 * (log + 1)
        self.relative = (error + worst + self.unit * (spread + many + 2 * log)).clamp(max=50).expm1()
        self.many = many
        # Of a probability; one below the normal range may be 0.
        self.p_error = torch.where(self.on, self.p * (self.relative + many * self.unit) + _TINY, 0.0)

    def _bend(self, error: Tensor, cap: float) -> Tensor:
        """The error of the capped score for that of the score; and the slope, with its error."""
        bent = self.bent.masked_fill(~self.on, 0.0)
        self.slope = 1 - bent.square()
        bent = bent.abs().nan_to_num(1.0, 1.0, 1.0)
        slope = (1 - bent.square()).clamp(min=0.0)
        # The quotient and tanh are off by a few units of themselves; what of them is below the normal range is lost.
        of_tanh = torch.minimum(error / cap, slope * error / cap + 0.39 * (error / cap).square())
        of_tanh = of_tanh + 7 * self.unit * bent + 2 * _TINY
        self.slope_error = 2 * bent * of_tanh + of_tanh.square() + 4 * self.unit
        return (cap * (of_tanh + self.unit * bent)).masked_fill(~self.on, 0.0)

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """left [.., Tq, n] · right [.., Tk, n], where each pair is its own: NaN does not leave it."""
        if self.finite:
            return left @ right.mT
        return (left.unsqueeze(3) * right.unsqueeze(2)).sum(-1)

    def _over_keys(self, factors: Tensor, rows: Tensor) -> Tensor:
        """Σ_j factors [.., Tq, Tk] · rows [.., Tk, n] over the keys that are attended to."""
        if self.finite:
            return factors @ rows
        terms = factors.unsqueeze(-1) * rows.unsqueeze(2)
        return torch.where((self.on & self.alive).unsqueeze(-1), terms, 0.0).sum(3)

    def _over_queries(self, factors: Tensor, rows: Tensor) -> Tensor:
        """Σ_i factors [.., Tq, Tk] · rows [.., Tq, n], summed over the query heads of a key head."""
        if self.finite:
            terms = factors.mT @ rows
        else:
            terms = factors.unsqueeze(-1) * rows.unsqueeze(3)
            terms = torch.where((self.on & self.alive).unsqueeze(-1), terms, 0.0).sum(2)
        return terms.unflatten(1, (self.kv_heads, -1)).sum(2)

    def _rounded(self, exact: Tensor, error: Tensor) -> Bounded:
        # Half types are rounded once more; the smallest number of the dtype stands for underflow.
        return exact, error + self.rounding * exact.abs().nan_to_num(0, 0, 0) + torch.finfo(
            self.dtype
        ).tiny + UNDERFLOW

    def forward(self) -> tuple[Bounded, Bounded]:
        """out [B, Hq, Tq, Dv] and lse [B, Hq, Tq]."""
        error = self._over_keys(self.p_error, self.value.abs())
        if not self.finite:  # scores of −inf alone, and values that are no numbers: 0 and NaN are both right
            bad = (self.on & ~self.value.isfinite().all(-1).unsqueeze(2)).any(-1, keepdim=True)
            error = error.masked_fill(bad & ~self.alive, math.inf)
        return self._rounded(self._over_keys(self.p, self.value), error), (
            self.lse.squeeze(-1),
            self.log_error.squeeze(-1),
        )

    def sink_gradient(self, grad_out: Tensor, grad_lse: Tensor | None) -> Bounded:
        """That of sink_logits [Hq]."""
        assert self.sinks is not None
        grad_out = grad_out.double()
        (out, out_error), (lse, lse_error) = self.forward()
        term = -(grad_out * out).sum(-1)
        size = (grad_out * out).abs().sum(-1)
        error = (grad_out.abs() * out_error).sum(-1) + (out.shape[-1] + 4) * self.unit * size
        if grad_lse is not None:
            term, size = term + grad_lse.double(), size + grad_lse.double().abs()
            error = error + 4 * self.unit * grad_lse.double().abs()
        p = self.p_sink.squeeze(-1)
        # Of p = exp(sink − lse), with the lse as it was stored, in float32.
        gap = (oracle.sink_column(p.unsqueeze(-1), self.sinks).squeeze(-1) - lse).nan_to_num(0, 0, 0).abs()
        relative = (lse_error + 2.0**-23 * (gap + 16)).clamp(max=50).expm1()
        there = p > 0
        error = torch.where(there, p * (error + relative * (size + error)), 0.0) + _TINY * (size + error)
        rows = p.shape[0] * p.shape[2] + 4
        total = torch.where(there, p * term, 0.0).sum((0, 2))
        error = (error + rows * self.unit * torch.where(there, p * size, 0.0)).sum((0, 2))
        dtype = torch.finfo(self.sinks.dtype)
        return total, error + dtype.eps * total.abs() + dtype.tiny + UNDERFLOW

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Bounded, Bounded, Bounded]:
        """The gradients of query, key and value."""
        grad_out, u = grad_out.double(), self.unit
        finite, self.finite = self.finite, self.finite and bool(grad_out.isfinite().all())
        grad_p = torch.where(self.on, self._products(grad_out, self.value), 0.0)
        grad_p_sizes = torch.where(self.on, self._products(grad_out.abs(), self.value.abs()), 0.0)
        on_p = torch.where(self.on & self.alive, self.p, 0.0)
        part = torch.where(self.on & self.alive, on_p * grad_p, 0.0)
        centre = part.sum(-1, keepdim=True)
        grad_p_error = (self.value.shape[-1] + 3) * u * grad_p_sizes
        p_error = torch.where(self.on & self.alive, self.p_error, 0.0)
        centre_error = on_p * grad_p_error + p_error * grad_p_sizes
        centre_error = centre_error.sum(-1, keepdim=True)
        if grad_lse is not None:
            extra = grad_lse.double().unsqueeze(-1)
            centre = centre - extra
            centre_error = centre_error + 4 * u * extra.abs()
        difference = grad_p - centre
        slope = self.slope.masked_fill(~self.on, 1.0)
        grad_s = torch.where(self.on & self.alive, on_p * difference * slope * self.scale, 0.0)
        error_s = on_p * (grad_p_error + centre_error + 4 * u * (grad_p.abs() + centre.abs()))
        error_s = error_s + p_error * difference.abs()
        error_s = (error_s * slope + (on_p * difference.abs() + error_s) * self.slope_error) * abs(
            self.scale
        ) + _TINY
        error_s = torch.where(self.on & self.alive, error_s, 0.0)
        many, rows = self.many, 4 + self.query.shape[2] * self.query.shape[1] // self.kv_heads
        query = (
            self._over_keys(grad_s, self.key),
            self._over_keys(error_s + many * u * grad_s.abs(), self.key.abs()),
        )
        key = (
            self._over_queries(grad_s, self.query),
            self._over_queries(error_s + rows * u * grad_s.abs(), self.query.abs()),
        )
        value = (
            self._over_queries(on_p, grad_out),
            self._over_queries(p_error + on_p * rows * u, grad_out.abs()),
        )
        self.finite = finite
        pairs = [self._rounded(*pair) for pair in (query, key, value)]
        if finite and bool(grad_out.isfinite().all()):
            return tuple(pairs)
        # What meets a number that is not finite: a query that attends to one, and the keys of that query.
        bad = (~t.isfinite().all(-1) for t in (self.query, grad_out, self.key, self.value))
        query_bad, grad_bad, key_bad, value_bad = bad
        spoiled = (self.on & (query_bad | grad_bad).unsqueeze(-1)) | (
            self.on & (key_bad | value_bad).unsqueeze(2)
        )
        spoiled = spoiled.any(-1)  # [B, Hq, Tq]
        met = (self.on & spoiled.unsqueeze(-1)).any(2).unflatten(1, (self.kv_heads, -1)).any(2)
        for number, where in enumerate((spoiled, met, met)):
            exact, error = pairs[number]
            pairs[number] = exact, error.masked_fill(where.unsqueeze(-1), math.inf)  # anything goes
        return tuple(pairs)


def attention_to(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, **scoring: Any) -> Attention:
    """Of the keys that indices name, repeated ones counting again."""
    return Attention(query, key, value, oracle.multiplicity(query, key, indices), **scoring)


def assert_bounded(actual: Tensor, bounded: Bounded, name: str) -> None:
    """Finite where the exact value is, and within its error there; no number where there is none."""
    exact, error = bounded
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, want {list(exact.shape)}"
    finite, there = exact.isfinite(), actual.isfinite()
    # A half type may overflow where the exact value does not.
    near = exact.abs().nan_to_num(0, 0, 0) + error.nan_to_num(0, 0, 0) > 0.99 * torch.finfo(actual.dtype).max
    wrong = (finite != there) & ~near & (error != math.inf)
    assert not bool(wrong.any()), (
        f"{name}: {int((finite & wrong).sum())} numbers are not finite and should be, {int((there & wrong).sum())} are "
        f"and should not, the first at {wrong.nonzero()[0].tolist()}"
    )
    excess = ((actual.double() - exact).abs() - error).where(finite & there & (error != math.inf), -math.inf)
    if excess.numel() and excess.max() > 0:
        place = (excess == excess.max()).nonzero()[0].tolist()
        at = tuple(place)
        raise AssertionError(
            f"{name}: at {place} got {actual[at].item():.9g}, want {exact[at].item():.9g} ± {error[at].item():.3g}"
        )
