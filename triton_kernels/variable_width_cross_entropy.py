"""`variable_width_cross_entropy`, forward: log-sum-exp over tiles of classes, no logit leaves the registers.

The hidden states are projected once per band, to their own type. A program then takes a tile of tokens and a run of
a band's classes, which are the rows of its table, and keeps a running maximum and sum per token; a last kernel
merges these partial sums in a fixed order and makes loss and LSE. Targets' logits are products of their own, so that
no logit is compared with a target.

Floor: N·Σ n_b·w_b multiply-adds on the tensor cores and N·V exponentials; in narrow bands the latter and the three or
four operations around each count most (4,096 tokens, V = 50,257, widths 512, 128 and 32: 57 µs of an H100's
exponential units, 46 µs of products).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot
from .matmul import product

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PROGRAMS = (
    528  # of one launch at least, where the problem has them: four for each multiprocessor of a large GPU
)
MOST_SPLITS = 64


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
        k = tl.arange(0, BLOCK_K)
        if RESIDENT:
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
        for first in range(begin, end, BLOCK_V):
            v = first + tl.arange(0, BLOCK_V)
            v_live = v < end
            if RESIDENT:
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
            z = tl.where(v_live[None, :], z, float("-inf"))
            new = tl.maximum(top, tl.max(z, axis=1) * LOG2E)
            new = tl.where(tl.abs(new) == float("inf"), 0.0, new)  # ∞ − ∞ would be NaN
            total = total * tl.exp2(top - new) + tl.sum(tl.exp2(z * LOG2E - new[:, None]), axis=1)
            top = new
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
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(target_band + n, mask=n < count, other=-1) >= 0
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(partial + split * count.to(tl.int64) + n, mask=active, other=0.0))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        part = partial + split * count.to(tl.int64) + n
        height = tl.load(part, mask=active, other=0.0)
        part += splits * count.to(tl.int64)
        total += tl.load(part, mask=active, other=1.0) * tl.exp2(height - top)
        if SMOOTH:
            weighted += tl.load(part + splits * count.to(tl.int64), mask=active, other=0.0)
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


class Classes:
    """What forward and backward share: each target's band and row, class weights, projected hidden states."""

    def __init__(
        self, hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, smooth
    ):
        count, device = targets.shape[0], targets.device
        self.tables, self.projections = tables, projections
        self.vocabulary = token_band.shape[0]
        self.weight = weight
        self.band, self.row = torch.empty((2, count), dtype=torch.int32, device=device)
        self.target_weight = torch.empty(
            count if weight is not None else 0, dtype=torch.float32, device=device
        )
        targets_kernel[(triton.cdiv(count, 256),)](
            self.band,
            self.row,
            self.target_weight,
            targets.contiguous(),
            token_band.contiguous(),
            token_row.contiguous(),
            targets if weight is None else weight.contiguous(),
            count,
            self.vocabulary,
            ignore_index,
            WEIGHTED=weight is not None,
            BLOCK=256,
            num_warps=4,
            sanitize_overflow=False,
        )
        self.weight_sum = None if weight is None else weight.to(torch.float32).sum()
        self.class_weight = [None] * len(tables)
        if smooth and weight is not None:  # by band and row, the bands stride apart
            stride = max(t.shape[0] for t in tables)
            by_class = weight.new_zeros((len(tables) * stride,), dtype=torch.float32)
            by_class.scatter_(0, token_band.to(torch.int64) * stride + token_row, weight.to(torch.float32))
            self.class_weight = [by_class[b * stride : b * stride + len(t)] for b, t in enumerate(tables)]

    def project(self, hidden: Tensor) -> list[Tensor]:  # [N, D] → B of [N, width]
        """One product for all bands; the results are columns of one matrix."""
        some = [p for p in self.projections if p.numel()]
        if not some:
            return [hidden] * len(self.tables)
        joined = product(hidden, self.joined_projections()).to(hidden.dtype)
        pieces = iter(joined.split([p.shape[1] for p in some], dim=1))
        return [next(pieces) if p.numel() else hidden for p in self.projections]

    def joined_projections(self) -> Tensor:  # [D, sum of the projected widths]
        some = [p for p in self.projections if p.numel()]
        return some[0] if len(some) == 1 else torch.cat(some, dim=1)


def forward_config(dtype: torch.dtype, width: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_N, BLOCK_V, BLOCK_K, num_warps, num_stages)"""
    block_k = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        return 32, 64, 16, 4, 2
    if block_k <= 64:
        return 128, 64, block_k, 4, 2
    if block_k <= 128:
        return 128, 128, block_k, 8, 2
    return 128, 128, 64, 8, 3


def class_splits(tiles: int, classes: int, block: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(splits, classes of one split), so that tiles · splits come to `programs` where there are classes enough."""
    splits = max(1, min(MOST_SPLITS, triton.cdiv(programs, tiles), triton.cdiv(classes, block)))
    share = triton.cdiv(triton.cdiv(classes, splits), block) * block
    return triton.cdiv(classes, share), share


def variable_width_cross_entropy(
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # int64 [N]
    tables: list[Tensor],  # B of [n, width]
    projections: list[Tensor],  # B of [D, width], or [0, 0] for none
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int32 [V]
    weight: Tensor | None,  # [V]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # loss [N], lse [N], 0 where the target is ignored
    count = targets.shape[0]
    loss = hidden.new_empty((count,), dtype=torch.float32)
    lse = torch.empty_like(loss)
    if count == 0:
        return loss, lse
    smooth = label_smoothing > 0
    c = Classes(hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, smooth)
    projected = c.project(hidden)
    bands = [b for b, t in enumerate(tables) if t.shape[0]]
    configs = {b: forward_config(hidden.dtype, tables[b].shape[1]) for b in bands}
    shares = {
        b: class_splits(triton.cdiv(count, configs[b][0]), tables[b].shape[0], configs[b][1]) for b in bands
    }
    splits = sum(shares[b][0] for b in bands)
    partial = hidden.new_empty((3 if smooth else 2, splits, count), dtype=torch.float32)
    target_logit = hidden.new_empty((count,), dtype=torch.float32)
    first = 0
    for b in bands:
        block_n, block_v, block_k, warps, stages = configs[b]
        own_splits, share = shares[b]
        table, h, (classes, width) = tables[b], projected[b], tables[b].shape
        strides = (h.stride(0), h.stride(1), table.stride(0), table.stride(1))
        weights = c.class_weight[b]
        partial_lse_kernel[(triton.cdiv(count, block_n), own_splits)](
            partial, h, table, c.band, partial if weights is None else weights,
            count, classes, share, first, splits, width, *strides,
            RESIDENT=width <= block_k, SMOOTH=smooth, WEIGHTED=weights is not None,
            BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        target_logits_kernel[(triton.cdiv(count, 32),)](
            target_logit, h, table, c.band, c.row, b, count, classes, width, *strides,
            BLOCK_N=32, BLOCK_K=min(64, max(16, triton.next_power_of_2(width))), num_warps=4,
        )  # fmt: skip
        first += own_splits
    loss_kernel[(triton.cdiv(count, 64),)](
        loss, lse, partial, c.band, target_logit, c.target_weight, lse if weight is None else c.weight_sum,
        count, splits, c.vocabulary, float(label_smoothing),
        SMOOTH=smooth, WEIGHTED=weight is not None, BLOCK=64, num_warps=2,
    )  # fmt: skip
    return loss, lse
