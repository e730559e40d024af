"""Kernels of the backward of `variable_width_cross_entropy`: logits again, tile by tile, and their gradient

    ∂L/∂z = softmax · p − sharp · [v = y] − flat · weight(v)

with three factors per token. It is rounded to the inputs' type only after the terms, which cancel, are added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2_OF_E
from .dot import dot
from .online_lse import class_logits


@triton.jit(do_not_specialize=["count", "smoothing", "vocabulary"])
def factors_kernel(
    factors,  # float32 [3, N]: softmax, sharp, flat; 0 where the target is ignored
    grad_loss,  # float32 [N]
    grad_lse,  # float32 [N]
    target_band,  # int32 [N]
    target_weight,  # float32 [N], if WEIGHTED
    weight_sum,  # float32 [], if WEIGHTED
    count,
    vocabulary,
    smoothing,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    active = tl.load(target_band + n, mask=inside, other=-1) >= 0
    # Selected, not multiplied: the gradient of a mean over nothing is inf, and inf · 0 is NaN.
    upstream = tl.load(grad_loss + n, mask=active, other=0.0)
    sharp = upstream * (1 - smoothing)
    flat = upstream * (smoothing / vocabulary)
    weights = vocabulary.to(tl.float32)
    if WEIGHTED:
        sharp *= tl.load(target_weight + n, mask=active, other=0.0)
        weights = tl.load(weight_sum)
    softmax = sharp + flat * weights + tl.load(grad_lse + n, mask=active, other=0.0)
    tl.store(factors + n, softmax, mask=inside)
    tl.store(factors + count.to(tl.int64) + n, sharp, mask=inside)
    tl.store(factors + 2 * count.to(tl.int64) + n, flat, mask=inside)


@triton.jit
def _token_terms(
    factors,  # float32 [3, N]
    lse,  # float32 [N]
    target_band,  # int32 [N]
    target_row,  # int32 [N]
    band,
    n,  # int64 [BLOCK_N]
    n_live,  # bool [BLOCK_N]
):
    """(softmax, LSE in base 2, the target's row in this band or −1) of each token; 0 past the end."""
    own = tl.load(target_band + n, mask=n_live, other=-1) == band
    row = tl.load(target_row + n, mask=own, other=-1)
    softmax = tl.load(factors + n, mask=n_live, other=0.0)
    return softmax, tl.load(lse + n, mask=n_live, other=0.0) * LOG2_OF_E, row


@triton.jit
def _grad_of(
    z,  # float32, [BLOCK_N, BLOCK_V] if AXIS is 1, [BLOCK_V, BLOCK_N] if 0
    softmax,  # float32 [BLOCK_N]
    lse2,  # float32 [BLOCK_N]
    row,  # [BLOCK_N]
    factors,  # float32 [3, N]
    n,  # int64 [BLOCK_N]
    n_live,  # bool [BLOCK_N]
    count,
    first,  # class of the tile
    class_weight,  # float32 [classes], if WEIGHTED
    v_live,  # bool [BLOCK_V]
    AXIS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The gradient of the logits. What few tiles need is loaded where it is needed, not kept in registers."""
    grad = tl.exp2(z * LOG2_OF_E - tl.expand_dims(lse2, AXIS)) * tl.expand_dims(softmax, AXIS)
    place = (row - first).to(tl.int32)  # of the target in this tile
    near = (place >= 0) & (place < BLOCK_V)
    if tl.max(near.to(tl.int32), axis=0) > 0:  # few tiles of a large band hold a target of these tokens
        sharp = tl.load(factors + count.to(tl.int64) + n, mask=n_live, other=0.0)
        is_target = tl.expand_dims(tl.arange(0, BLOCK_V), 1 - AXIS) == tl.expand_dims(place, AXIS)
        grad = tl.where(is_target, grad - tl.expand_dims(sharp, AXIS), grad)
    if SMOOTH:
        flat = tl.expand_dims(tl.load(factors + 2 * count.to(tl.int64) + n, mask=n_live, other=0.0), AXIS)
        if WEIGHTED:
            weights = tl.load(class_weight + first + tl.arange(0, BLOCK_V), mask=v_live, other=0.0)
            grad -= flat * tl.expand_dims(weights, 1 - AXIS)
        else:
            grad -= flat
    return grad


@triton.jit
def _projected_step(
    total,  # float32 [BLOCK_N, BLOCK_W]
    first,  # class of the tile
    end,
    h,  # [BLOCK_N, BLOCK_W]
    table,
    softmax,  # [BLOCK_N], as the next four
    lse2,
    row,
    factors,
    n,
    n_live,
    count,
    class_weight,
    width,
    table_row,
    table_column,
    WHOLE: tl.constexpr,  # all classes of the tile exist: no number need be masked
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """total + the tile's gradient of the logits · its rows of the table."""
    k = tl.arange(0, BLOCK_W)
    v = first + tl.arange(0, BLOCK_V)
    v_live = v < end
    e = tl.load(
        table + v[:, None] * table_row + (k * table_column)[None, :],
        mask=v_live[:, None] & (k < width)[None, :],
        other=0.0,
    )
    z = dot(h, tl.trans(e), tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32))
    grad = _grad_of(
        z, softmax, lse2, row, factors, n, n_live, count, first, class_weight, v_live,
        1, BLOCK_V, SMOOTH, WEIGHTED,
    )  # fmt: skip
    if not WHOLE:
        grad = tl.where(v_live[None, :], grad, 0.0)  # it can be ∞, and ∞ · 0 is NaN
    return dot(grad.to(e.dtype), e, total)


@triton.jit(do_not_specialize=["count", "classes", "share", "band"])
def grad_projected_kernel(
    partial,  # float32 [splits, N, width]
    projected,  # [N, width]
    table,  # [classes, width]
    factors,  # float32 [3, N]
    lse,  # float32 [N]
    target_band,  # int32 [N]
    target_row,  # int32 [N]
    class_weight,  # float32 [classes], if WEIGHTED
    band,
    count,
    classes,
    share,  # classes of one split
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    n_live = n < count
    k = tl.arange(0, BLOCK_W)
    shown = n_live[:, None] & (k < width)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    active = tl.load(target_band + n, mask=n_live, other=-1) >= 0
    if tl.max(active.to(tl.int32), axis=0) > 0:
        softmax, lse2, row = _token_terms(factors, lse, target_band, target_row, band, n, n_live)
        h = tl.load(
            projected + n[:, None] * projected_row + (k * projected_column)[None, :], mask=shown, other=0.0
        )
        begin = split * share
        end = tl.minimum(classes, begin + share)
        whole = begin + (end - begin) // BLOCK_V * BLOCK_V
        for first in range(begin, whole, BLOCK_V):
            total = _projected_step(
                total, first, end, h, table, softmax, lse2, row, factors, n, n_live, count, class_weight, width,
                table_row, table_column, True, SMOOTH, WEIGHTED, BLOCK_N, BLOCK_V, BLOCK_W,
            )  # fmt: skip
        if whole < end:
            total = _projected_step(
                total, whole, end, h, table, softmax, lse2, row, factors, n, n_live, count, class_weight, width,
                table_row, table_column, False, SMOOTH, WEIGHTED, BLOCK_N, BLOCK_V, BLOCK_W,
            )  # fmt: skip
    tl.store(partial + (split * count + n[:, None]) * width + k[None, :], total, mask=shown)


@triton.jit(do_not_specialize=["count", "classes", "share", "band"])
def grad_table_kernel(
    partial,  # float32 [splits, classes, width]
    projected,  # [N, width]
    table,  # [classes, width]
    factors,  # float32 [3, N]
    lse,  # float32 [N]
    target_band,  # int32 [N]
    target_row,  # int32 [N]
    class_weight,  # float32 [classes], if WEIGHTED
    band,
    count,
    classes,
    share,  # tokens of one split
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_V
    split = tl.program_id(1).to(tl.int64)
    v = first + tl.arange(0, BLOCK_V)
    v_live = v < classes
    k = tl.arange(0, BLOCK_W)
    shown = v_live[:, None] & (k < width)[None, :]
    e = tl.load(table + v[:, None] * table_row + (k * table_column)[None, :], mask=shown, other=0.0)
    total = tl.zeros((BLOCK_V, BLOCK_W), dtype=tl.float32)
    begin = split * share
    end = tl.minimum(count, begin + share).to(tl.int64)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_live = n < end
        softmax, lse2, row = _token_terms(factors, lse, target_band, target_row, band, n, n_live)
        h = tl.load(
            projected + n[:, None] * projected_row + (k * projected_column)[None, :],
            mask=n_live[:, None] & (k < width)[None, :],
            other=0.0,
        )
        z = dot(e, tl.trans(h), tl.zeros((BLOCK_V, BLOCK_N), dtype=tl.float32))
        grad = _grad_of(
            z, softmax, lse2, row, factors, n, n_live, count, first, class_weight, v_live,
            0, BLOCK_V, SMOOTH, WEIGHTED,
        )  # fmt: skip
        total = dot(grad.to(h.dtype), h, total)
    tl.store(partial + (split * classes + v[:, None]) * width + k[None, :], total, mask=shown)


@triton.jit(do_not_specialize=["count", "classes", "band", "first_class"])
def grad_logits_kernel(
    grad,  # [N, classes of the chunk]
    projected,  # [N, width]
    table,  # [classes, width]: the chunk's rows
    factors,  # float32 [3, N]
    lse,  # float32 [N]
    target_band,  # int32 [N]
    target_row,  # int32 [N]
    class_weight,  # float32 [classes], if WEIGHTED
    band,
    count,
    classes,
    first_class,  # of the chunk in its band
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    class_tiles = tl.cdiv(classes, BLOCK_V)
    n = (tl.program_id(0) // class_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tl.program_id(0) % class_tiles).to(tl.int64) * BLOCK_V
    v = first + tl.arange(0, BLOCK_V)
    n_live, v_live = n < count, v < classes
    z = class_logits(
        projected, table, n, v, n_live, v_live, width, projected_row, projected_column, table_row,
        table_column, BLOCK_N, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    softmax, lse2, row = _token_terms(factors, lse, target_band, target_row, band, n, n_live)
    value = _grad_of(
        z, softmax, lse2, row - first_class, factors, n, n_live, count, first, class_weight, v_live,
        1, BLOCK_V, SMOOTH, WEIGHTED,
    )  # fmt: skip
    tl.store(
        grad + n[:, None] * classes + v[None, :],
        value.to(grad.dtype.element_ty),
        mask=n_live[:, None] & v_live[None, :],
    )
