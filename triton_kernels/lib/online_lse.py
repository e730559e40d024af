"""Kernels of the forward of `variable_width_cross_entropy`: targets, log-sum-exp over tiles of classes, loss."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LN2, LOG2_OF_E
from .dot import dot


# debug=True compiles the assertion in: a target out of range must not pass in silence, as in F.cross_entropy.
@triton.jit(debug=True, do_not_specialize=["count", "vocabulary", "ignore_index"])
def targets_kernel(
    target_band,  # int32 [N]: −1 where the target is ignored
    target_row,  # int32 [N]
    target_weight,  # float32 [N]
    targets,  # int64 [N]
    token_band,  # int32 [V]
    token_row,  # int32 [V]
    weight,  # [V], if WEIGHTED
    count,
    vocabulary,
    ignore_index,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    target = tl.load(targets + n, mask=inside, other=0)
    in_range = (target >= 0) & (target < vocabulary)
    tl.device_assert(in_range | ~inside | (target == ignore_index), "a target is outside of the vocabulary")
    active = inside & in_range & (target != ignore_index)
    tl.store(target_band + n, tl.load(token_band + target, mask=active, other=-1), mask=inside)
    tl.store(target_row + n, tl.load(token_row + target, mask=active, other=-1), mask=inside)
    if WEIGHTED:
        factor = tl.load(weight + target, mask=active, other=0.0).to(tl.float32)
        tl.store(target_weight + n, factor, mask=inside)


@triton.jit
def class_logits(
    projected,  # [N, width]
    table,  # [classes, width]
    n,  # int64 [BLOCK_N]
    v,  # int64 [BLOCK_V]
    n_live,  # bool [BLOCK_N]
    v_live,  # bool [BLOCK_V]
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_V], of any width."""
    k = tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        live = first + k < width
        h = tl.load(
            projected + n[:, None] * projected_row + ((first + k) * projected_column)[None, :],
            mask=n_live[:, None] & live[None, :],
            other=0.0,
        )
        e = tl.load(
            table + v[:, None] * table_row + ((first + k) * table_column)[None, :],
            mask=v_live[:, None] & live[None, :],
            other=0.0,
        )
        z = dot(h, tl.trans(e), z)
    return z


@triton.jit
def _lse_step(
    top,  # float32 [BLOCK_N]: maximum so far, in base 2
    total,  # float32 [BLOCK_N]
    weighted,  # float32 [BLOCK_N]
    first,  # class of the tile
    end,
    h,  # [BLOCK_N, BLOCK_K], if RESIDENT
    projected,
    table,
    class_weight,
    n,  # int64 [BLOCK_N]
    n_live,  # bool [BLOCK_N]
    width,
    projected_row,
    projected_column,
    table_row,
    table_column,
    WHOLE: tl.constexpr,  # all classes of the tile exist: no logit need be masked
    RESIDENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    v = first + tl.arange(0, BLOCK_V)
    v_live = v < end
    if RESIDENT:
        k = tl.arange(0, BLOCK_K)
        e = tl.load(
            table + v[:, None] * table_row + (k * table_column)[None, :],
            mask=v_live[:, None] & (k < width)[None, :],
            other=0.0,
        )
        z = dot(h, tl.trans(e), tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32))
    else:
        z = class_logits(
            projected, table, n, v, n_live, v_live, width, projected_row, projected_column,
            table_row, table_column, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
    if SMOOTH:
        if WEIGHTED:
            factor = tl.load(class_weight + v, mask=v_live, other=0.0)
            weighted += tl.sum(z * factor[None, :], axis=1)
        else:
            weighted += tl.sum(z, axis=1)  # rows past the end are zeros
    if not WHOLE:
        z = tl.where(v_live[None, :], z, float("-inf"))
    new = tl.maximum(top, tl.max(z, axis=1) * LOG2_OF_E)
    new = tl.where(tl.abs(new) == float("inf"), 0.0, new)  # ∞ − ∞ would be NaN
    total = total * tl.exp2(top - new) + tl.sum(tl.exp2(z * LOG2_OF_E - new[:, None]), axis=1)
    return new, total, weighted


@triton.jit(do_not_specialize=["count", "classes", "share", "first_split", "splits"])
def partial_lse_kernel(
    partial,  # float32 [3, splits of all bands, N]: maximum (base 2), sum, and Σ weight · logit if SMOOTH
    projected,  # [N, width]
    table,  # [classes, width]
    target_band,  # int32 [N]
    class_weight,  # float32 [classes], if WEIGHTED
    count,
    classes,
    share,  # classes of one split
    first_split,
    splits,  # of all bands
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    RESIDENT: tl.constexpr,  # BLOCK_K holds the width: a token's projected state is read once
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    n_live = n < count
    active = tl.load(target_band + n, mask=n_live, other=-1) >= 0
    # What is ignored is read by nobody, so a tile of nothing else need not write.
    if tl.max(active.to(tl.int32), axis=0) > 0:
        h = 0.0
        if RESIDENT:
            k = tl.arange(0, BLOCK_K)
            h = tl.load(
                projected + n[:, None] * projected_row + (k * projected_column)[None, :],
                mask=n_live[:, None] & (k < width)[None, :],
                other=0.0,
            )
        top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
        begin = split * share
        end = tl.minimum(classes, begin + share)
        whole = begin + (end - begin) // BLOCK_V * BLOCK_V
        for first in range(begin, whole, BLOCK_V):
            top, total, weighted = _lse_step(
                top, total, weighted, first, end, h, projected, table, class_weight, n, n_live, width,
                projected_row, projected_column, table_row, table_column,
                True, RESIDENT, SMOOTH, WEIGHTED, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
        if whole < end:
            top, total, weighted = _lse_step(
                top, total, weighted, whole, end, h, projected, table, class_weight, n, n_live, width,
                projected_row, projected_column, table_row, table_column,
                False, RESIDENT, SMOOTH, WEIGHTED, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
        target = partial + (first_split + split) * count + n
        tl.store(target, top, mask=n_live)
        tl.store(target + splits.to(tl.int64) * count, total, mask=n_live)
        if SMOOTH:
            tl.store(target + splits.to(tl.int64) * 2 * count, weighted, mask=n_live)


@triton.jit(do_not_specialize=["count", "classes", "band"])
def target_logits_kernel(
    target_logit,  # float32 [N]
    projected,  # [N, width]
    table,  # [classes, width]
    target_band,  # int32 [N]
    target_row,  # int32 [N]
    band,
    count,
    classes,
    width,
    projected_row,  # strides
    projected_column,
    table_row,
    table_column,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.load(target_band + n, mask=n < count, other=-1) == band
    row = tl.load(target_row + n, mask=own, other=0).to(tl.int64)
    known = own & (row >= 0) & (row < classes)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, width, BLOCK_K):
        live = known[:, None] & (first + k < width)[None, :]
        h = tl.load(
            projected + n[:, None] * projected_row + ((first + k) * projected_column)[None, :],
            mask=live,
            other=0.0,
        )
        e = tl.load(
            table + row[:, None] * table_row + ((first + k) * table_column)[None, :], mask=live, other=0.0
        )
        total += tl.sum(h.to(tl.float32) * e.to(tl.float32), axis=1)
    tl.store(target_logit + n, total, mask=own)


@triton.jit(do_not_specialize=["count", "splits", "vocabulary", "smoothing"])
def loss_kernel(
    loss,  # float32 [N]
    lse,  # float32 [N]
    partial,  # float32 [3, splits, N]
    target_band,  # int32 [N]
    target_logit,  # float32 [N]
    target_weight,  # float32 [N], if WEIGHTED
    weight_sum,  # float32 [], if WEIGHTED
    count,
    splits,
    vocabulary,
    smoothing,
    SMOOTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(target_band + n, mask=n < count, other=-1) >= 0
    top = tl.where(active, float("-inf"), 0.0)  # numbers where nothing is read, so that no NaN comes up there
    total = tl.where(active, 0.0, 1.0)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        shown = (split < splits)[:, None] & active[None, :]
        part = partial + split[:, None] * count + n[None, :]
        height = tl.load(part, mask=shown, other=float("-inf"))
        part += splits.to(tl.int64) * count
        sums = tl.load(part, mask=shown, other=0.0)
        new = tl.maximum(top, tl.max(height, axis=0))
        total = total * tl.exp2(top - new) + tl.sum(sums * tl.exp2(height - new[None, :]), axis=0)
        top = new
        if SMOOTH:
            part += splits.to(tl.int64) * count
            weighted += tl.sum(tl.load(part, mask=shown, other=0.0), axis=0)
    whole = (top + tl.log2(total)) * LN2
    value = (1 - smoothing) * (whole - tl.load(target_logit + n, mask=active, other=0.0))
    weights = vocabulary.to(tl.float32)
    if WEIGHTED:
        value *= tl.load(target_weight + n, mask=active, other=0.0)
        weights = tl.load(weight_sum)
    if SMOOTH:
        value += smoothing / vocabulary * (weights * whole - weighted)
    tl.store(loss + n, tl.where(active, value, 0.0), mask=n < count)
    tl.store(lse + n, tl.where(active, whole, 0.0), mask=n < count)
