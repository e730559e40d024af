"""One step of a softmax whose keys come in tiles, and of its gradient: what the kernels that attend share."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_OF_E
from .soft_cap import tanh


@triton.jit
def softmax_step(
    scores,  # float32 [M, N] in base 2, −inf where a row does not see a key
    largest,  # float32 [M], of what came before
    total,  # float32 [M]
):
    """(weights [M, N], by what sums so far shrink [M], largest, total)."""
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    base = tl.where(larger == float("-inf"), 0.0, larger)  # −inf − −inf would be NaN
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    return weights, shrink, larger, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def first_of_softmax(
    sink_logits,  # float32 [Hq] or None
    head,  # int64 [M]
    present,  # bool [M]
    BLOCK_M: tl.constexpr,
):
    """(largest, total) before any key."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sink_logits is not None:
        largest = tl.load(sink_logits + head, mask=present, other=float("-inf")) * LOG2_OF_E
        # exp2(0), or NaN of a logit that is no number.
        total = tl.where(largest == float("-inf"), 0.0, 1.0 + (largest - largest))
    return largest, total


@triton.jit
def base_of(
    lse,  # float32, natural
):
    """What is taken from a row's exponents: +inf where nothing is attended to, so that its probabilities are 0."""
    base = lse * LOG2_OF_E
    return tl.where(base == float("-inf"), float("inf"), base)


@triton.jit
def gradient_step(
    products,  # float32: q·k times the factor
    grad_products,  # float32: dO·v
    bias,  # of the scores in base 2, or 0
    seen,  # bool
    base,  # `base_of` the row's LSE
    delta,  # the row's dO·O − dLSE
    bound,  # of the soft cap in base 2, or None
):
    """(probabilities, their scores' gradients), 0 where not seen; operands that broadcast."""
    if bound is not None:
        bent = tanh(products)
        weights = tl.exp2(bent * bound + bias - base)
    else:
        weights = tl.exp2(products + bias - base)
    weights = tl.where(seen, weights, 0.0)
    slopes = weights * (grad_products - delta)
    if bound is not None:
        slopes *= 1.0 - bent * bent
    return weights, tl.where(seen, slopes, 0.0)
