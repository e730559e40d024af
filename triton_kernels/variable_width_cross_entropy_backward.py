"""`variable_width_cross_entropy`, backward: logits computed again, and two products with their gradient.

Narrow bands of half types: one kernel takes a tile of tokens through a run of classes for the gradient of the
projected hidden states, another a tile of classes through a run of tokens for the table's; each computes its logits
itself, so no program adds to memory that another adds to. Wide bands, whose sums would not fit in registers, and
float32 write the logits' gradient of a chunk of classes (CHUNK numbers at most, whatever the vocabulary) and leave both
products to matrix multiplication. Every sum has one order.

Floor: four products of N·Σ n_b·w_b multiply-adds and 2·N·V exponentials where fused, three products and N·V where not.

float16: the factors are divided by the largest of them and the results multiplied by it again, so that the gradients
of a mean over many tokens do not vanish in between.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .lib import logit_gradients as kernels
from .lib.common import near_rows
from .lib.matmul import PROGRAMS, product
from .lib.tuning import run_tuned, size_class
from .variable_width_cross_entropy import Classes, class_splits

CHUNK = 1 << 24  # numbers of a chunk's logits' gradient
FUSED_WIDTH = {
    torch.bfloat16: 128,
    torch.float16: 128,
    torch.float32: 0,
}  # the widest band of the fused kernels
HEADROOM = 256.0  # float16: a probability of 1e-5 times a factor of at most this is a normal number


def fused_configs(width: int) -> list[tuple[int, int, int, int, int]]:
    """Of the two fused kernels: (streamed block, own block, BLOCK_W, num_warps, num_stages)"""
    block_w = max(16, triton.next_power_of_2(width))
    return [
        (streamed, own, block_w, warps, stages)
        for streamed, own, warps, stages in ((64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3))
    ]


def chunk_configs(dtype: torch.dtype) -> list[tuple[int, int, int, int, int]]:
    """(BLOCK_N, BLOCK_V, BLOCK_K, num_warps, num_stages)"""
    if dtype == torch.float32:
        return [(64, 64, 16, 4, 2), (64, 64, 16, 8, 2), (32, 64, 16, 4, 2)]
    return [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4)]


class _Gradients:
    """One call: what all bands share."""

    def __init__(self, c: Classes, hidden, lse, grad_loss, grad_lse, label_smoothing):
        self.c, self.lse, self.smooth = c, lse.contiguous(), label_smoothing > 0
        self.count, self.dtype = hidden.shape[0], hidden.dtype
        # An ignored token counts as 0, NaN or not.
        self.hidden = near_rows(torch.where((c.band >= 0).unsqueeze(1), hidden, 0.0))
        self.projected = c.project(self.hidden)
        self.factors = hidden.new_empty((3, self.count), dtype=torch.float32)
        kernels.factors_kernel[(triton.cdiv(self.count, 256),)](
            self.factors,
            grad_loss.contiguous(),
            grad_lse.contiguous(),
            c.band,
            c.target_weight,
            lse if c.weight is None else c.weight_sum,
            self.count,
            c.vocabulary,
            float(label_smoothing),
            WEIGHTED=c.weight is not None,
            BLOCK=256,
            num_warps=4,
        )
        self.largest = None
        if self.dtype == torch.float16:
            largest = self.factors.abs().amax()
            self.largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
            self.factors *= HEADROOM / self.largest

    def arguments(self, b: int) -> tuple:
        weights = self.c.class_weight[b]
        return self.factors, self.lse, self.c.band, self.c.row, self.lse if weights is None else weights, b

    def flags(self, b: int) -> dict:
        return {"SMOOTH": self.smooth, "WEIGHTED": self.c.class_weight[b] is not None}

    def finished(self, x: Tensor, headroom: float = 1.0) -> Tensor:
        """x in the inputs' type, with the scale of float16 taken out."""
        return (
            x.to(self.dtype)
            if self.largest is None
            else (x.float() * (self.largest / headroom)).to(self.dtype)
        )

    def of_band(self, b: int) -> tuple[Tensor, Tensor]:
        """(gradient of the projected hidden states [N, width], still divided by `largest`; gradient of the table)."""
        table, h = self.c.tables[b], self.projected[b]
        if table.shape[0] == 0:
            return torch.zeros_like(h), torch.zeros_like(table)
        if table.shape[1] <= FUSED_WIDTH[self.dtype]:
            return self._fused(b, h, table)
        return self._chunked(b, h, table)

    def _tuned(self, name: str, table: Tensor, configs: list[tuple], run) -> Tensor:
        shape = (self.dtype, table.shape[1], size_class(table.shape[0]), size_class(self.count), self.smooth)
        name = f"variable_width_cross_entropy_backward {name}"
        return run_tuned(name, shape, configs, run, table.device)

    def _fused(self, b: int, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        (classes, width), count = table.shape, self.count
        strides = (h.stride(0), h.stride(1), table.stride(0), table.stride(1))

        def of_projected(config: tuple) -> Tensor:  # float32 [splits, N, width]
            streamed, own, block_w, warps, stages = config
            tiles = triton.cdiv(count, own)
            splits, share = class_splits(tiles, classes, streamed, PROGRAMS)
            back = h.new_empty((splits, count, width), dtype=torch.float32)
            kernels.grad_projected_kernel[(tiles, splits)](
                back, h, table, *self.arguments(b), count, classes, share, width, *strides, **self.flags(b),
                BLOCK_N=own, BLOCK_V=streamed, BLOCK_W=block_w, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return back

        def of_table(config: tuple) -> Tensor:  # float32 [splits, classes, width]
            streamed, own, block_w, warps, stages = config
            tiles = triton.cdiv(classes, own)
            splits = max(1, min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(count, 4 * streamed)))
            share = triton.cdiv(triton.cdiv(count, splits), streamed) * streamed
            grad = h.new_empty((splits, classes, width), dtype=torch.float32)
            kernels.grad_table_kernel[(tiles, splits)](
                grad, h, table, *self.arguments(b), count, classes, share, width, *strides, **self.flags(b),
                BLOCK_N=streamed, BLOCK_V=own, BLOCK_W=block_w, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return grad

        configs = fused_configs(width)
        back = self._tuned("projected", table, configs, of_projected)
        grad = self._tuned("table", table, configs, of_table)
        return self._narrowed(_sum(back)), self.finished(_sum(grad), HEADROOM)

    def _narrowed(self, back: Tensor) -> Tensor:
        return (back if self.largest is None else back / HEADROOM).to(self.dtype)

    def _chunked(self, b: int, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        classes = table.shape[0]
        block = chunk_configs(self.dtype)[0][1]
        size = max(block, CHUNK // self.count // block * block)
        grad = table.new_empty(table.shape)
        back = None
        for first in range(0, classes, size):
            part = table[first : first + size]
            logits = self._logits(b, h, part, first)
            grad[first : first + size] = self.finished(product(logits.t(), h), HEADROOM)
            piece = product(logits, part)
            back = piece if back is None else back.float() + piece
        return self._narrowed(back), grad

    def _logits(self, b: int, h: Tensor, part: Tensor, first: int) -> Tensor:  # [N, classes of the chunk]
        """The gradient of the logits of the chunk of classes that begins at `first`."""
        found, width = part.shape
        logits = h.new_empty((self.count, found))
        weights = self.lse if self.c.class_weight[b] is None else self.c.class_weight[b][first:]

        def launch(config: tuple) -> None:
            block_n, block_v, block_k, warps, stages = config
            kernels.grad_logits_kernel[(triton.cdiv(self.count, block_n) * triton.cdiv(found, block_v),)](
                logits, h, part, *self.arguments(b)[:4], weights, b, self.count, found, first, width,
                h.stride(0), h.stride(1), part.stride(0), part.stride(1), **self.flags(b),
                BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        self._tuned("logits", part, chunk_configs(self.dtype), launch)
        return logits


def _sum(partial: Tensor) -> Tensor:  # [splits, …]
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def variable_width_cross_entropy_backward(
    grad_loss: Tensor,  # [N]
    grad_lse: Tensor,  # [N]
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # int64 [N]
    tables: list[Tensor],  # B of [n, width]
    projections: list[Tensor],  # B of [D, width], or [0, 0] for none
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int32 [V]
    weight: Tensor | None,  # [V]
    lse: Tensor,  # float32 [N]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # gradients of hidden, tables, projections
    if hidden.shape[0] == 0:
        return (
            hidden.new_empty(hidden.shape),
            [t.new_zeros(t.shape) for t in tables],
            [p.new_zeros(p.shape) for p in projections],
        )
    c = Classes(
        hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, label_smoothing > 0
    )
    g = _Gradients(c, hidden, lse, grad_loss, grad_lse, label_smoothing)
    backs, grad_tables = zip(*(g.of_band(b) for b in range(len(tables))), strict=True)
    grad_hidden = None
    for back, p in zip(backs, projections, strict=True):
        if not p.numel():
            grad_hidden = back if grad_hidden is None else grad_hidden.float() + back
    grad_projections = [p.new_empty(p.shape) for p in projections]
    some = [b for b, p in enumerate(projections) if p.numel()]
    if some:
        joined = backs[some[0]] if len(some) == 1 else torch.cat([backs[b] for b in some], dim=1)
        factors = c.joined_projections().t()
        if grad_hidden is None:
            grad_hidden = product(joined, factors)
        elif hidden.dtype == torch.bfloat16:
            grad_hidden = torch.addmm(grad_hidden.to(hidden.dtype), joined, factors)
        else:
            grad_hidden = grad_hidden + product(joined, factors)
        pieces = g.finished(product(g.hidden.t(), joined))
        for b, piece in zip(some, pieces.split([projections[b].shape[1] for b in some], dim=1), strict=True):
            grad_projections[b].copy_(piece)
    return g.finished(grad_hidden).contiguous(), list(grad_tables), grad_projections
