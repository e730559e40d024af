"""The matrix product inside kernels: exact in float32, and right in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _probe():
    pass


# Triton's interpreter keeps bfloat16 as integers, and multiplies those.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def dot(a, b, total):
    """total + a · b: a [M, K], b [K, N] of one dtype, total float32 [M, N]; no TF32. Sums of int8 are exact."""
    if INTERPRETED:
        # NumPy's float32 products of equal rows differ by their place in the matrix, which breaks ties; in float64
        # they do so beyond what the rounding to float32 leaves.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        total += product.to(tl.float32)
    elif a.dtype == tl.int8:
        total += tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total
