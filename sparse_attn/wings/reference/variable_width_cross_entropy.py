"""Definition of `variable_width_cross_entropy` and of its gradient.

Classes are numbered in band order: band 0's rows, then band 1's, and so on. Logits exist for a chunk of tokens at
a time.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.wing import implements


def _classes_of(token_band: Tensor, token_row: Tensor, tables: list[Tensor]) -> Tensor:
    """The class number of each token, int64 [V]."""
    starts = itertools.accumulate((t.shape[0] for t in tables[:-1]), initial=0)
    first = torch.stack([torch.full((), f, dtype=torch.int64, device=token_row.device) for f in starts])
    return first[token_band.to(torch.int64)] + token_row.to(torch.int64)


class _BandedLoss:
    """What forward and backward share."""

    def __init__(self, hidden, targets, tables, projections, token_band, token_row, weight, ignore_index):
        self.compute = torch.promote_types(hidden.dtype, torch.float32)
        self.tables = [t.to(self.compute) for t in tables]
        self.projections = [p.to(self.compute) if p.numel() else None for p in projections]
        self.vocabulary = token_band.shape[0]
        self.active = targets != ignore_index
        tokens = torch.where(self.active, targets, 0)
        classes = _classes_of(token_band, token_row, tables)
        self.target = classes.index_select(0, tokens).unsqueeze(1)  # [N, 1]
        self.hidden = hidden
        if weight is None:
            weight = self.tables[0].new_ones((self.vocabulary,))
        self.target_weight = weight.to(self.compute).index_select(0, tokens)
        self.weight = torch.zeros_like(weight, dtype=self.compute).scatter_(
            0, classes, weight.to(self.compute)
        )

    def chunks(self):
        return query_chunks(self.hidden.shape[0], 2 * self.vocabulary)

    def projected(self, chunk: slice) -> tuple[Tensor, list[Tensor]]:
        """(hidden [n, D], one [n, width] per band) of a chunk; an ignored token counts as 0, NaN or not."""
        hidden = torch.where(self.active[chunk].unsqueeze(1), self.hidden[chunk].to(self.compute), 0.0)
        return hidden, [hidden if p is None else hidden @ p for p in self.projections]

    def logits(self, projected: list[Tensor]) -> Tensor:
        """[n, V] in class order."""
        return torch.cat([h @ t.t() for h, t in zip(projected, self.tables, strict=True)], dim=1)


@implements
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
    p = _BandedLoss(hidden, targets, tables, projections, token_band, token_row, weight, ignore_index)
    loss = hidden.new_zeros(targets.shape, dtype=p.compute)
    lse = torch.zeros_like(loss)
    for chunk in p.chunks():
        logits = p.logits(p.projected(chunk)[1])
        total = logits.logsumexp(1)
        picked = logits.gather(1, p.target[chunk]).squeeze(1)
        value = (1 - label_smoothing) * p.target_weight[chunk] * (total - picked)
        if label_smoothing > 0:
            smooth = p.weight.sum() * total - logits @ p.weight
            value = value + label_smoothing / p.vocabulary * smooth
        loss[chunk] = torch.where(p.active[chunk], value, 0.0)
        lse[chunk] = torch.where(p.active[chunk], total, 0.0)
    return loss, lse


@implements
def variable_width_cross_entropy_backward(
    grad_loss: Tensor,  # [N]
    grad_lse: Tensor,  # [N]
    hidden: Tensor,
    targets: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    token_band: Tensor,
    token_row: Tensor,
    weight: Tensor | None,
    lse: Tensor,  # [N]; other wings need it, this one recomputes
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # gradients of hidden, tables, projections
    p = _BandedLoss(hidden, targets, tables, projections, token_band, token_row, weight, ignore_index)
    grad_hidden = hidden.new_zeros(hidden.shape)
    grad_tables = [torch.zeros_like(t) for t in p.tables]
    grad_projections = [None if q is None else torch.zeros_like(q) for q in p.projections]
    per_class = label_smoothing / p.vocabulary
    sharp = grad_loss * (1 - label_smoothing) * p.target_weight
    # d loss / d logit = softmax · P − sharp · [v = target] − grad_loss · per_class · weight(v)
    softmax = sharp + grad_loss * per_class * p.weight.sum() + grad_lse
    for chunk in p.chunks():
        chunk_hidden, projected = p.projected(chunk)
        grad = p.logits(projected).softmax(1) * softmax[chunk].unsqueeze(1)
        grad.scatter_add_(1, p.target[chunk], -sharp[chunk].unsqueeze(1))
        if label_smoothing > 0:
            grad = grad - (grad_loss[chunk] * per_class).unsqueeze(1) * p.weight
        # Not a product: the gradient of a mean over nothing is inf, and inf · 0 is NaN.
        grad = torch.where(p.active[chunk].unsqueeze(1), grad, 0.0)
        total = torch.zeros_like(chunk_hidden)
        pieces = grad.split([t.shape[0] for t in p.tables], dim=1)
        for b, (piece, table, projection) in enumerate(zip(pieces, p.tables, p.projections, strict=True)):
            grad_tables[b] += piece.t() @ projected[b]
            back = piece @ table
            if projection is None:
                total += back
            else:
                grad_projections[b] += chunk_hidden.t() @ back
                total += back @ projection.t()
        grad_hidden[chunk] = total.to(hidden.dtype)
    return (
        grad_hidden,
        [g.to(hidden.dtype) for g in grad_tables],
        [
            q.new_zeros(q.shape) if g is None else g.to(hidden.dtype)
            for g, q in zip(grad_projections, projections, strict=True)
        ],
    )


def along(
    hidden: Tensor,  # [N, D]
    targets: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    token_band: Tensor,
    token_row: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    hidden_move: Tensor | None,  # the tangents, each of its tensor's shape; None is 0
    table_moves: list[Tensor | None],
    projection_moves: list[Tensor | None],
) -> tuple[Tensor, Tensor]:  # of loss [N] and of lse [N]
    """Forward mode of `variable_width_cross_entropy`; differentiable itself, and nothing is changed in place."""
    p = _BandedLoss(hidden, targets, tables, projections, token_band, token_row, weight, ignore_index)
    losses, lses = [p.tables[0].new_zeros((0,))], [p.tables[0].new_zeros((0,))]
    for chunk in p.chunks():
        chunk_hidden, projected = p.projected(chunk)
        moves = []  # of the logits, by band
        for h, table, projection, table_move, projection_move in zip(
            projected, p.tables, p.projections, table_moves, projection_moves, strict=True
        ):
            move = torch.zeros_like(chunk_hidden)
            if hidden_move is not None:
                move = torch.where(p.active[chunk].unsqueeze(1), hidden_move[chunk].to(p.compute), 0.0)
            if projection is not None:
                move = move @ projection
                if projection_move is not None:
                    move = move + chunk_hidden @ projection_move.to(p.compute)
            move = move @ table.t()
            moves.append(move if table_move is None else move + h @ table_move.to(p.compute).t())
        move = torch.cat(moves, dim=1)  # [n, V] in class order
        total = (p.logits(projected).softmax(1) * move).sum(1)
        picked = move.gather(1, p.target[chunk]).squeeze(1)
        value = (1 - label_smoothing) * p.target_weight[chunk] * (total - picked)
        if label_smoothing > 0:
            value = value + label_smoothing / p.vocabulary * (p.weight.sum() * total - move @ p.weight)
        losses.append(torch.where(p.active[chunk], value, 0.0))
        lses.append(torch.where(p.active[chunk], total, 0.0))
    return torch.cat(losses), torch.cat(lses)
