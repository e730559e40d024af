"""`variable_width_cross_entropy`: exact cross-entropy over a vocabulary in bands, without its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import cross_entropy as checks
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.declare import Backward, Forward, Op
from sparse_attn.ops.shards import shardable
from sparse_attn.wings.reference.variable_width_cross_entropy import along


def fake(
    hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, label_smoothing
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(targets.shape, dtype=dtype), hidden.new_empty(targets.shape, dtype=dtype)


def fake_backward(grad_loss, grad_lse, hidden, targets, tables, projections, *others):
    return (
        hidden.new_empty(hidden.shape),
        [t.new_empty(t.shape) for t in tables],
        [p.new_empty(p.shape) for p in projections],
    )


_ARGUMENTS = (
    "Tensor hidden, Tensor targets, Tensor[] tables, Tensor[] projections, Tensor token_band, Tensor token_row, "
    "Tensor? weight"
)
_OPTIONS = "int ignore_index, float label_smoothing"
BACKWARD = Op(
    "variable_width_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor grad_lse, {_ARGUMENTS}, Tensor lse, {_OPTIONS}) -> "
    "(Tensor grad_hidden, Tensor[] grad_tables, Tensor[] grad_projections)",
    fake_backward,
    gradient_of="variable_width_cross_entropy",
)


def backward(call: Backward) -> dict[str, Any]:
    s, grads = call.saved, call.grads
    found = BACKWARD.on(call.wing)(
        torch.zeros_like(s.lse) if grads.loss is None else grads.loss,
        torch.zeros_like(s.lse) if grads.lse is None else grads.lse,
        s.hidden, s.targets, s.tables, s.projections, s.token_band, s.token_row, s.weight, s.lse,
        s.ignore_index, s.label_smoothing,
    )  # fmt: skip
    return dict(zip(("hidden", "tables", "projections"), found, strict=True))


def tangent(
    call: Forward,
    hidden,
    targets,
    tables,
    projections,
    token_band,
    token_row,
    weight,
    ignore_index,
    label_smoothing,
) -> dict[str, Tensor]:
    moves = call.tangents
    loss, lse = along(
        hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, label_smoothing,
        moves.hidden, moves.tables, moves.projections,
    )  # fmt: skip
    return {"loss": loss, "lse": lse}


OP = Op(
    "variable_width_cross_entropy",
    f"({_ARGUMENTS}, {_OPTIONS}) -> (Tensor loss, Tensor lse)",
    fake,
    saved="hidden targets tables projections token_band token_row weight lse ignore_index label_smoothing",
    backward=backward,
    tangent=tangent,
    batch="hidden targets loss lse",
    shared="tables projections token_band token_row weight",
)


@shardable("hidden:*D targets:* tables projections token_band token_row weight", "*", look=3)
def variable_width_cross_entropy(
    hidden: Tensor,  # [..., D]
    targets: Tensor,  # int64 [...]
    tables: Sequence[Tensor],  # B of [n, width]
    projections: Sequence[Tensor | None],  # B of [D, width], or None
    token_band: Tensor,  # int [V]
    token_row: Tensor,  # int [V]
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,  # [V]
    backend: str | None = None,
) -> Tensor:
    r"""Exact cross-entropy over the whole vocabulary of a variable-width output head, logits never stored.

    With b the band of token t, E_b its table and P_b its projection, the head's logit is

    .. math:: z_t = h \cdot P_b\, E_b[\mathrm{row}(t)] = (P_b^\top h) \cdot E_b[\mathrm{row}(t)]

    so the hidden state is projected once per band, and each class costs the width of its band. The loss is that of
    `F.cross_entropy(z, targets, …)`, with the log-sum-exp taken over tiles of classes (online softmax) and the
    tiles computed again in the backward. `z_loss` adds z_loss · lse² to each token's loss (PaLM's log-Z penalty),
    before the reduction and its denominator.

    Args:
        hidden: [..., D], float32, float16, bfloat16 or float64.
        targets: int64 (or int32) [...]: ids in [0, V), or `ignore_index`.
        tables: B tensors [n_b, w_b] in hidden's dtype; together they hold one row for each token.
        projections: B entries [D, w_b], as `nn.Linear.weight`, or None where w_b = D.
        token_band: integers [V] in [0, B): the band of each token.
        token_row: integers [V]: its row in that band's table; no two tokens share one.
        ignore_index: targets of this value count for nothing: loss 0, no gradient.
        reduction: "mean" (over the targets that count, weighted where weight is given; nan where none counts),
            "sum", or "none".
        label_smoothing: from 0 to 1, as in F.cross_entropy.
        z_loss: factor of lse², at least 0; PaLM takes 1e-4.
        weight: [V], a factor for each class, as in F.cross_entropy; it gets no gradient.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Returns:
        A scalar, or [...] with reduction="none"; float32 for half types too (float64 for float64). Products are
        summed in float32. Under `torch.autocast` hidden, tables and projections are cast as for a linear layer.

    Raises:
        IndexError: a target outside of the vocabulary: which one, and where (read on the CPU only).
        TypeError, ValueError: another wrong argument, named in the message.
        NotImplementedError: a second derivative in reverse mode is asked for (docs/torch_func.md says what is there).

    Sources: Baevski and Auli (2019) and Grave et al. (2017) for heads in bands; Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models" (2024) for the recomputed tiles; Chowdhery et al. (2022) for the z-loss.

    Example:
        >>> import torch, sparse_attn
        >>> tables = [torch.randn(10, 16), torch.randn(90, 4)]
        >>> projections = [None, torch.randn(16, 4)]
        >>> token_band = (torch.arange(100) >= 10).int()
        >>> token_row = torch.cat([torch.arange(10), torch.arange(90)])
        >>> hidden = torch.randn(2, 3, 16, requires_grad=True)
        >>> targets = torch.tensor([[3, 99, 3], [0, -100, 50]])
        >>> loss = sparse_attn.variable_width_cross_entropy(
        ...     hidden, targets, tables, projections, token_band, token_row
        ... )
        >>> loss.backward()
    """
    tables, projections, token_band, token_row, dim = checks.bands_of(
        tables, projections, token_band, token_row
    )
    vocabulary = token_band.shape[0]
    hidden, *cast = autocast(hidden, *tables, *projections)
    tables, projections = cast[: len(tables)], cast[len(tables) :]
    hidden = checks.hidden_of(hidden, tables, dim)
    ignore_index = checks.ignore_index_of(ignore_index)
    shape = hidden.shape[:-1]
    targets = checks.targets_of(targets, hidden, vocabulary, ignore_index)
    reduction = checks.reduction_of(reduction)
    label_smoothing = checks.factor("label_smoothing", label_smoothing, 1.0)
    z_loss = checks.factor("z_loss", z_loss)
    weight = checks.class_weight_of(weight, tables, vocabulary)

    wing = OP.choose(hidden, backend)
    loss, lse = OP.on(wing)(
        hidden.reshape(-1, dim),
        targets,
        tables,
        projections,
        token_band,
        token_row,
        weight,
        ignore_index,
        label_smoothing,
    )
    if z_loss > 0:
        loss = loss + z_loss * lse.square()  # both are 0 where the target is ignored
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "sum":
        return loss.sum()
    active = targets != ignore_index
    if weight is None:
        return loss.sum() / active.sum()
    return loss.sum() / torch.where(active, weight[torch.where(active, targets, 0)], 0.0).sum()
