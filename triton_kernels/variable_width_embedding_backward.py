"""`variable_width_embedding`, backward: sums per row without atomics, and the projections' gradients.

Both gradients are linear in the positions, so half types go through the tensor cores as they are:

    grad E[u] = Σ P^T · grad_out(n) over the positions n of row u
    grad P = Σ grad_out(n) · E[row(n)]^T over the positions n of the band

The positions are sorted by row (stable), so that a band is a range of them and a row a run. grad_out is projected
position by position to the band's width, and those narrow float32 rows are summed run by run (run_sums.py). The
projection's gradient is a product over the band's positions, divided into a fixed number of sums that are added in
order. So results repeat bit by bit.

Floor: grad_out read twice (for tables and for projections) and the tables' gradients written; the sort of the keys
comes on top, some 30 µs at 16k positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lib.common import near_rows
from .lib.dot import dot
from .lib.run_sums import power_of_2, sum_runs
from .lib.tuning import run_tuned, size_class
from .variable_width_embedding import row_keys


@triton.jit(do_not_specialize=["band"])
def project_back_kernel(
    back,  # float32 [N, width]: of the band's positions in sorted order
    grad_out,  # [N, D]
    order,  # int64 [N]: position of each place in sorted order
    bounds,  # int64 [B + 1]: where each band begins in sorted order
    projection,  # [D, width]
    band,
    dim,
    width,
    grad_row,  # strides
    grad_column,
    projection_row,
    projection_column,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    first = tl.load(bounds + band) + tl.program_id(0).to(tl.int64) * BLOCK_N
    last = tl.load(bounds + band + 1)
    if first < last:
        place = first + tl.arange(0, BLOCK_N)
        inside = place < last
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        start = grad_out + tl.load(order + place, mask=inside, other=0) * grad_row
        d = tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for begin in range(0, dim, BLOCK_D):
            live = begin + d < dim
            grad = tl.load(
                start[:, None] + ((begin + d) * grad_column)[None, :],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            factors = tl.load(
                projection
                + (begin + d).to(tl.int64)[:, None] * projection_row
                + (columns * projection_column)[None, :],
                mask=live[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            total = dot(grad, factors, total)
        tl.store(
            back + place[:, None] * width + columns[None, :],
            total,
            mask=inside[:, None] & (columns < width)[None, :],
        )


@triton.jit(do_not_specialize=["band", "first_key", "rows"])
def projection_grad_kernel(
    partial,  # float32 [splits, D, width]
    grad_out,  # [N, D]
    order,  # int64 [N]
    keys,  # int [N]
    bounds,  # int64 [B + 1]
    table,  # [rows, width]
    band,
    first_key,
    rows,
    dim,
    width,
    grad_row,  # strides
    grad_column,
    table_row,
    table_column,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The positions of the band are divided evenly among the splits, and each writes its sum."""
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    first = tl.load(bounds + band)
    last = tl.load(bounds + band + 1)
    share = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(last, begin + share)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_D, BLOCK_W), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        inside = place < end
        position = tl.load(order + place, mask=inside, other=0)
        row = tl.load(keys + place, mask=inside, other=0).to(tl.int64) - first_key
        inside = inside & (row >= 0) & (row < rows)
        grad = tl.load(
            grad_out + position[:, None] * grad_row + (d * grad_column)[None, :],
            mask=inside[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        found = tl.load(
            table + row[:, None] * table_row + (columns * table_column)[None, :],
            mask=inside[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total = dot(tl.trans(grad), found, total)
    target = (split.to(tl.int64) * dim + d[:, None]) * width + columns[None, :]
    tl.store(partial + target, total, mask=(d < dim)[:, None] & (columns < width)[None, :])


def project_back_configs(dtype: torch.dtype, width: int) -> list[tuple[int, int, int, int]]:
    """(BLOCK_N, BLOCK_D, BLOCK_W, num_warps)"""
    if dtype == torch.float32:
        wide = power_of_2(width, 16, 64)
        return [(32, 16, wide, 4), (64, 16, wide, 8), (32, 32, wide, 4)]
    wide = power_of_2(width, 16, 128)
    return [(64, 64, wide, 4), (128, 64, wide, 8), (32, 64, wide, 4)]


def projection_grad_configs(dtype: torch.dtype, dim: int, width: int) -> list[tuple[int, int, int, int]]:
    """(BLOCK_N, BLOCK_D, BLOCK_W, num_warps)"""
    deep = power_of_2(dim, 16, 64)
    if dtype == torch.float32:
        wide = power_of_2(width, 16, 64)
        return [(32, deep, wide, 8), (16, deep, wide, 8), (32, deep, wide, 4)]
    wide = power_of_2(width, 16, 128)
    return [(64, deep, wide, 4), (32, deep, wide, 4), (64, power_of_2(dim, 16, 128), wide, 8)]


class _Sorted:
    """The positions in the order of their rows; a band is a range of them."""

    def __init__(self, flat, tables, token_band, token_row, padding_idx):
        keys, self.stride = row_keys(flat, tables, token_band, token_row, padding_idx)
        self.keys, self.order = torch.sort(keys, stable=True)
        # Where each band's keys begin: no value comes back to the host.
        starts = torch.arange(len(tables) + 1, device=keys.device, dtype=keys.dtype) * self.stride
        self.bounds = torch.searchsorted(self.keys, starts)

    def distinct(self, tables: list[Tensor]) -> tuple[Tensor, list[int], list[Tensor]]:
        """(the number of each place's row among the distinct ones, each band's first number, each band's rows).

        Their sizes are read on the host: sparse gradients have no others.
        """
        is_head = torch.ones_like(self.keys, dtype=torch.bool)
        torch.ne(self.keys[1:], self.keys[:-1], out=is_head[1:])
        number = is_head.cumsum(0)
        before = torch.cat([number.new_zeros(1), number])[self.bounds].tolist()
        heads = self.keys[is_head].to(torch.int64)
        rows = [heads[before[b] : before[b + 1]] - b * self.stride for b in range(len(tables))]
        return number - 1, before, rows


def _grad_projection(
    grad_out: Tensor,  # [N, D]
    table: Tensor,  # [rows, width]
    projection: Tensor,  # [D, width]
    band: int,
    at: _Sorted,
) -> Tensor:  # [D, width]
    count, (dim, width) = grad_out.shape[0], projection.shape

    def launch(config: tuple[int, int, int, int]) -> Tensor:  # float32 [splits, D, width]
        block_n, block_d, block_w, warps = config
        tiles = triton.cdiv(dim, block_d) * triton.cdiv(width, block_w)
        # Enough programs to fill a large GPU, and no share below a few blocks.
        splits = max(1, min(triton.cdiv(264, tiles), triton.cdiv(count, 4 * block_n)))
        partial = torch.empty((splits, dim, width), dtype=torch.float32, device=grad_out.device)
        projection_grad_kernel[(triton.cdiv(dim, block_d), triton.cdiv(width, block_w), splits)](
            partial, grad_out, at.order, at.keys, at.bounds, table, band, band * at.stride, table.shape[0],
            dim, width, *grad_out.stride(), *table.stride(),
            BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_W=block_w, num_warps=warps, num_stages=2,
        )  # fmt: skip
        return partial

    configs = projection_grad_configs(grad_out.dtype, dim, width)
    partial = run_tuned(
        "variable_width_embedding_backward projection",
        _shape(grad_out, width),
        configs,
        launch,
        grad_out.device,
    )
    return (partial[0] if partial.shape[0] == 1 else partial.sum(0)).to(projection.dtype)


def _shape(grad_out: Tensor, width: int) -> tuple:
    return grad_out.dtype, grad_out.shape[1], width, size_class(grad_out.shape[0])


def _project_back(
    grad_out: Tensor,  # [N, D]
    projection: Tensor,  # [D, width]
    band: int,
    at: _Sorted,
) -> Tensor:  # float32 [N, width], in sorted order; what lies outside of the band is not written
    count, (dim, width) = grad_out.shape[0], projection.shape
    back = torch.empty((count, width), dtype=torch.float32, device=grad_out.device)

    def launch(config: tuple[int, int, int, int]) -> None:
        block_n, block_d, block_w, warps = config
        project_back_kernel[(triton.cdiv(count, block_n), triton.cdiv(width, block_w))](
            back, grad_out, at.order, at.bounds, projection, band, dim, width, *grad_out.stride(),
            *projection.stride(),
            BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_W=block_w, num_warps=warps, num_stages=2,
        )  # fmt: skip

    configs = project_back_configs(grad_out.dtype, width)
    run_tuned(
        "variable_width_embedding_backward rows", _shape(grad_out, width), configs, launch, grad_out.device
    )
    return back


def variable_width_embedding_backward(
    grad_out: Tensor,  # [*, D]
    ids: Tensor,  # int [*]
    tables: list[Tensor],  # B of [n, width]
    projections: list[Tensor],  # B of [D, width], or [0, 0] for none
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int [V]
    padding_idx: int,
    sparse: bool,
    need_tables: bool,
    need_projections: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(gradients of the tables, of the projections, rows): lists of B tensors, or empty where not needed."""
    dim = projections[0].shape[0] or tables[0].shape[1]
    flat = ids.reshape(-1).contiguous()
    grad_out = near_rows(grad_out.reshape(-1, dim).to(tables[0].dtype))
    tables, projections = [near_rows(t) for t in tables], [near_rows(p) for p in projections]
    bands = range(len(tables))
    if flat.shape[0] == 0:
        sizes = [0 if sparse else t.shape[0] for t in tables]
        return (
            [t.new_zeros((n, t.shape[1])) for t, n in zip(tables, sizes, strict=True)] if need_tables else [],
            [p.new_zeros(p.shape) for p in projections] if need_projections else [],
            [flat.new_empty((0,), dtype=torch.int64) for _ in tables] if need_tables and sparse else [],
        )
    at = _Sorted(flat, tables, token_band.contiguous(), token_row.contiguous(), padding_idx)
    grad_tables, grad_projections, rows = [], [], []
    if need_projections:
        for b in bands:
            used = projections[b].numel() and tables[b].shape[0]
            grad_projections.append(
                _grad_projection(grad_out, tables[b], projections[b], b, at)
                if used
                else projections[b].new_zeros(projections[b].shape)
            )
    if need_tables:
        keys, first = at.keys, [b * at.stride for b in bands]
        if sparse:
            keys, first, rows = at.distinct(tables)
        for b in bands:
            # Every distinct row is written, so a sparse gradient need not be zero before.
            size = rows[b].shape[0] if sparse else tables[b].shape[0]
            make = tables[b].new_empty if sparse else tables[b].new_zeros
            grad_tables.append(make((size, tables[b].shape[1])))
            if size == 0:
                continue
            projected = projections[b].numel() > 0
            values = _project_back(grad_out, projections[b], b, at) if projected else grad_out
            sum_runs(grad_tables[b], values, keys, first[b], b, at.order, at.bounds, not projected)
    return grad_tables, grad_projections, rows
