"""The soft cap of scores: bound · tanh(x), with factors that leave the exponents in base 2.

A kernel takes `factor` and `bound`: its scores are q·k times `factor`, and where there is a cap (`bound` is not None)
tanh of that times `bound`.
"""

from __future__ import annotations

import triton
import triton.language as tl


def factors(scale: float, softcap: float, unit: float) -> tuple[float, float | None]:
    """(factor, bound) of scores in units of 1/`unit` (log2 e for exponents of 2); softcap 0 is none."""
    return (scale / softcap, softcap * unit) if softcap else (scale * unit, None)


@triton.jit
def tanh(x):
    """tanh of float32: no difference of nearly equal numbers, so x itself near 0; ±1 at the ends; NaN stays NaN."""
    size = tl.abs(x)
    small = tl.exp2(size * -2.8853900817779268)  # e^(−2|x|), −2 · log2 e
    far = (1.0 - small) / (1.0 + small)
    square = x * x
    # Minimax on |x| <= 0.55: relative error 1e-9.
    series = -0.0062824733 * square + 0.021077758
    series = series * square - 0.053853858
    series = series * square + 0.13332602
    series = series * square - 0.33333318
    near = size + size * (square * series)
    bent = tl.where(size < 0.55, near, far)
    return tl.where(x < 0.0, -bent, bent)


@triton.jit
def capped(
    x,
    bound,  # float or None
):
    if bound is not None:
        x = tanh(x) * bound
    return x
