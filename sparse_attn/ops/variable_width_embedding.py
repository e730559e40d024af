"""`variable_width_embedding`: rows of a width that depends on the token, brought to the model's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks.embedding import embedding_arguments
from sparse_attn.checks.values import mapped
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.shards import shardable


def fake(ids, tables, projections, token_band, token_row, padding_idx, sparse) -> Tensor:
    return tables[0].new_empty((*ids.shape, projections[0].shape[0] or tables[0].shape[1]))


def fake_backward(
    grad_out,
    ids,
    tables,
    projections,
    token_band,
    token_row,
    padding_idx,
    sparse,
    need_tables,
    need_projections,
):
    grad_projections = [p.new_empty(p.shape) for p in projections] if need_projections else []
    if not need_tables:
        return [], grad_projections, []
    if not sparse:
        return [t.new_empty(t.shape) for t in tables], grad_projections, []
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in tables]
    rows = [t.new_empty((size,), dtype=torch.int64) for t, size in zip(tables, sizes, strict=True)]
    return (
        [t.new_empty((n, t.shape[1])) for t, n in zip(tables, sizes, strict=True)],
        grad_projections,
        rows,
    )


_ARGUMENTS = (
    "Tensor ids, Tensor[] tables, Tensor[] projections, Tensor token_band, Tensor token_row, int padding_idx, "
    "bool sparse"
)
BACKWARD = Op(
    "variable_width_embedding_backward",
    f"(Tensor grad_out, {_ARGUMENTS}, bool need_tables, bool need_projections) -> "
    "(Tensor[] grad_tables, Tensor[] grad_projections, Tensor[] rows)",
    fake_backward,
    gradient_of="variable_width_embedding",
)


def _chosen(grads: list[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    if not grads:
        return [None] * len(needed)
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _sparse_rows(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), grad, table.shape, is_coalesced=True, check_invariants=False
    )


def backward(call: Backward) -> dict[str, Any]:
    s, tables, projections = call.saved, call.needs["tables"], call.needs["projections"]
    if s.sparse and any(mapped(t) for t in (call.grads.out, s.ids, *s.tables, *s.projections)):
        raise NotImplementedError(
            "sparse=True has no gradients under torch.func.vmap, whose entries must be of one size: use sparse=False"
        )
    grad_tables, grad_projections, rows = BACKWARD.on(call.wing)(
        call.grads.out, s.ids, s.tables, s.projections, s.token_band, s.token_row, s.padding_idx, s.sparse,
        any(tables), any(projections),
    )  # fmt: skip
    if s.sparse:
        grad_tables = [
            _sparse_rows(row, grad, table)
            for row, grad, table in zip(rows, grad_tables, s.tables, strict=False)
        ]
    return {
        "tables": _chosen(grad_tables, tables),
        "projections": _chosen(grad_projections, projections),
    }


def tangent(
    call: Forward, ids, tables, projections, token_band, token_row, padding_idx, sparse
) -> dict[str, Tensor]:
    """The op is linear in the tables, and in the projections: itself along each."""
    total: Any = 0.0
    for moved in ("tables", "projections"):
        moves = getattr(call.tangents, moved)
        if all(move is None for move in moves):
            continue
        given = tables if moved == "tables" else projections
        moves = [torch.zeros_like(t) if m is None else m for m, t in zip(moves, given, strict=True)]
        if moved == "tables":
            parts = moves, projections
        else:
            # A band without a projection does not move with it.
            still = [
                t if p.numel() else torch.zeros_like(t) for t, p in zip(tables, projections, strict=True)
            ]
            parts = still, moves
        total = total + OP.on(call.wing)(ids, *parts, token_band, token_row, padding_idx, False)
    return {"out": total}


OP = Op(
    "variable_width_embedding",
    f"({_ARGUMENTS}) -> Tensor out",
    fake,
    saved="ids tables projections token_band token_row padding_idx sparse",
    backward=backward,
    tangent=tangent,
    batch="ids out",
    shared="tables projections token_band token_row",
)


@shardable("ids:* tables projections token_band token_row", "*D", look=2)
def variable_width_embedding(
    ids: Tensor,  # int [*]
    tables: Sequence[Tensor],  # B of [n, width]
    projections: Sequence[Tensor | None],  # B of [D, width], or None
    token_band: Tensor,  # int [V]
    token_row: Tensor,  # int [V]
    *,
    padding_idx: int | None = None,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Embeddings whose rows are wide for some tokens and narrow for others, differentiable in both.

    The tokens are divided into B bands. With b the band of token t, E_b the band's table [n_b, w_b] and P_b its
    projection [D, w_b]:

    .. math:: \mathrm{out}(t) = P_{b(t)}\, E_{b(t)}[\mathrm{row}(t)]

    and the row itself where the band has no projection, since it is as wide as the model. Each row that occurs is
    projected once however often it occurs; half types accumulate in float32; results and gradients are the same
    for any number of threads in the CPU wing.

    Args:
        ids: int32 or int64 of any shape and strides, each in [0, V). The ids need no order of frequency.
        tables: B tensors [n_b, w_b]: float32, float16, bfloat16 or float64, one dtype, one device.
        projections: B entries [D, w_b], as `nn.Linear.weight`, or None where w_b = D and the row is taken as it is.
        token_band: integers [V] in [0, B): the band of each token.
        token_row: integers [V]: its row in that band's table. Tokens may share a row.
        padding_idx: a token whose embedding is 0 and has no gradient, in whatever band it is; a negative one
            counts from the end.
        sparse: give the tables gradients of layout `torch.sparse_coo` (coalesced) with the rows that occur alone.
            Gradients of projections are always dense. Dense gradients cost a zero-filled tensor per table.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        [*ids.shape, D] in the tables' dtype, under `torch.autocast` too: like `nn.Embedding`, it casts nothing.

    Raises:
        IndexError: an id outside the vocabulary: which one, and where. On an accelerator the lookup asserts on the
            device instead, as that of nn.Embedding, for reading ids back would wait for the device.
        TypeError, ValueError: another wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for (docs/torch_func.md says what is there).

    Sources: Baevski and Auli, "Adaptive Input Representations for Neural Language Modeling" (2019), whose bands
    need ids in order of frequency; Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient
    Recommendation Systems" (2021).

    Example:
        >>> import torch, sparse_attn
        >>> tables = [torch.randn(10, 16), torch.randn(90, 4)]
        >>> projections = [None, torch.randn(16, 4)]
        >>> token_band = (torch.arange(100) >= 10).int()
        >>> token_row = torch.cat([torch.arange(10), torch.arange(90)])
        >>> ids = torch.tensor([[3, 99, 3], [0, 10, 50]])
        >>> sparse_attn.variable_width_embedding(ids, tables, projections, token_band, token_row).shape
        torch.Size([2, 3, 16])
    """
    arguments = embedding_arguments(ids, tables, projections, token_band, token_row, padding_idx)
    sparse = checks.boolean("sparse", sparse)
    tables = arguments[1]
    sizes = {"bands": len(tables), "sparse_gradients": int(sparse)}
    wing = OP.choose(tables[0], backend, sizes=sizes)
    return OP.on(wing)(*arguments, sparse)
