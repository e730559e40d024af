"""Definition of `variable_width_embedding` and of its gradient.

Each band computes all positions and keeps its own: no size depends on the ids, so an accelerator need not wait
for the host. Only sparse gradients have such sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.wing import implements


def _positions_of(
    ids: Tensor, token_band: Tensor, token_row: Tensor, padding_idx: int, band: int
) -> tuple[Tensor, Tensor]:
    """For flat ids [N]: which of them lie in the band, bool [N, 1], and their rows, int64 [N], 0 for the others."""
    # index_select asserts that an id is in range on every device; plain indexing would let a negative one wrap.
    inside = token_band.index_select(0, ids) == band
    if padding_idx >= 0:
        inside = inside & (ids != padding_idx)
    rows = torch.where(inside, token_row.index_select(0, ids), 0).to(torch.int64)
    return inside.unsqueeze(1), rows


@implements
def variable_width_embedding(
    ids: Tensor,  # int [*]
    tables: list[Tensor],  # B of [n, width]
    projections: list[Tensor],  # B of [D, width], or [0, 0] for none
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int [V]
    padding_idx: int,  # −1 for none
    sparse: bool,
) -> Tensor:  # [*, D]
    flat = ids.reshape(-1)
    dtype = tables[0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    dim = projections[0].shape[0] or tables[0].shape[1]
    out = tables[0].new_zeros((flat.shape[0], dim))
    for band, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        if table.shape[0] == 0:
            continue
        inside, rows = _positions_of(flat, token_band, token_row, padding_idx, band)
        found = table.index_select(0, rows)
        if projection.numel():
            found = (found.to(compute) @ projection.to(compute).t()).to(dtype)
        out = torch.where(inside, found, out)
    return out.reshape(*ids.shape, dim)


@implements
def variable_width_embedding_backward(
    grad_out: Tensor,  # [*, D]
    ids: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    token_band: Tensor,
    token_row: Tensor,
    padding_idx: int,
    sparse: bool,
    need_tables: bool,
    need_projections: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(gradients of the tables, of the projections, rows): lists of B tensors, or empty where not needed.

    With `sparse` the gradient of a table is [distinct, width], and belongs to its rows rows[b] [distinct], ascending.
    """
    flat = ids.reshape(-1)
    compute = torch.promote_types(grad_out.dtype, torch.float32)
    dim = projections[0].shape[0] or tables[0].shape[1]
    grad = grad_out.reshape(flat.shape[0], dim).to(compute)
    grad_tables, grad_projections, hit = [], [], []
    for band, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        inside, rows = _positions_of(flat, token_band, token_row, padding_idx, band)
        own = torch.where(inside, grad, 0.0)
        if need_projections:
            if projection.numel() and table.shape[0]:
                # Not 0 · NaN: the rows of other bands' positions must not be read into the sum.
                found = torch.where(inside, table.index_select(0, rows).to(compute), 0.0)
                grad_projections.append((own.t() @ found).to(table.dtype))
            else:
                grad_projections.append(projection.new_zeros(projection.shape))
        if not need_tables:
            continue
        if projection.numel():
            own = torch.where(inside, own @ projection.to(compute), 0.0)
        size = table.shape[0]
        if sparse:
            keep = inside.squeeze(1)
            distinct, rows = torch.unique(rows[keep], return_inverse=True)
            own, size = own[keep], distinct.shape[0]
            hit.append(distinct)
        elif size == 0:
            own, rows = own[:0], rows[:0]
        total = own.new_zeros((size, table.shape[1])).index_add_(0, rows, own)
        grad_tables.append(total.to(table.dtype))
    return grad_tables, grad_projections, hit
