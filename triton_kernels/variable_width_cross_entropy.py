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

from functools import partial

import torch
import triton
from torch import Tensor

from .lib.common import near_rows
from .lib.matmul import product
from .lib.online_lse import loss_kernel, partial_lse_kernel, target_logits_kernel, targets_kernel
from .lib.tuning import chosen, size_class

# Of one launch, where the problem has them: four for each multiprocessor of a large GPU.
PROGRAMS = 528
MOST_SPLITS = 64


class Classes:
    """What forward and backward share: each target's band and row, class weights, projected hidden states."""

    def __init__(
        self, hidden, targets, tables, projections, token_band, token_row, weight, ignore_index, smooth
    ):
        count, device = targets.shape[0], targets.device
        self.tables, self.projections = [near_rows(t) for t in tables], projections
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


def forward_configs(dtype: torch.dtype, width: int) -> list[tuple[int, int, int, int, int]]:
    """(BLOCK_N, BLOCK_V, BLOCK_K, num_warps, num_stages); the others: smaller and larger tiles, deeper pipelines."""
    block_k = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        return [(32, 32, 16, 4, 2), (64, 32, 16, 4, 2), (16, 32, 16, 2, 2)]
    if block_k <= 64:
        return [(128, 64, block_k, 4, 2), (64, 64, block_k, 4, 3), (128, 128, block_k, 8, 2)]
    if block_k <= 128:
        return [(128, 128, block_k, 8, 2), (128, 64, block_k, 4, 2), (64, 128, block_k, 4, 2)]
    return [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4)]


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
    tables, projected = c.tables, c.project(near_rows(hidden))
    bands = [b for b, t in enumerate(tables) if t.shape[0]]

    def launch(b: int, config: tuple, sums: Tensor | None = None, first: int = 0) -> None:
        """Band b's maxima and sums, into rows of `sums` or, where it is only timed, of its own."""
        block_n, block_v, block_k, warps, stages = config
        own, share = splits_of(b, config)
        if sums is None:
            sums = hidden.new_empty((rows, own, count), dtype=torch.float32)
        table, h, (classes, width), weights = tables[b], projected[b], tables[b].shape, c.class_weight[b]
        partial_lse_kernel[(triton.cdiv(count, block_n), own)](
            sums, h, table, c.band, sums if weights is None else weights,
            count, classes, share, first, sums.shape[1], width, *strides(b),
            RESIDENT=width <= block_k, SMOOTH=smooth, WEIGHTED=weights is not None,
            BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def splits_of(b: int, config: tuple) -> tuple[int, int]:
        return class_splits(triton.cdiv(count, config[0]), tables[b].shape[0], config[1])

    def strides(b: int) -> tuple:
        return (*projected[b].stride(), *tables[b].stride())

    rows = 3 if smooth else 2
    configs = {
        b: chosen(
            "variable_width_cross_entropy band",
            (hidden.dtype, tables[b].shape[1], size_class(tables[b].shape[0]), size_class(count), smooth),
            forward_configs(hidden.dtype, tables[b].shape[1]),
            partial(launch, b),
            hidden.device,
        )
        for b in bands
    }
    splits = sum(splits_of(b, configs[b])[0] for b in bands)
    partials = hidden.new_empty((rows, splits, count), dtype=torch.float32)
    target_logit = hidden.new_empty((count,), dtype=torch.float32)
    first = 0
    for b in bands:
        launch(b, configs[b], partials, first)
        first += splits_of(b, configs[b])[0]
        classes, width = tables[b].shape
        target_logits_kernel[(triton.cdiv(count, 16),)](
            target_logit, projected[b], tables[b], c.band, c.row, b, count, classes, width, *strides(b),
            BLOCK_N=16, BLOCK_K=min(256, max(16, triton.next_power_of_2(width))), num_warps=4,
        )  # fmt: skip
    loss_kernel[(triton.cdiv(count, 32),)](
        loss, lse, partials, c.band, target_logit, c.target_weight, lse if weight is None else c.weight_sum,
        count, splits, c.vocabulary, float(label_smoothing),
        SMOOTH=smooth, WEIGHTED=weight is not None, BLOCK=32, BLOCK_S=32, num_warps=2,
    )  # fmt: skip
    return loss, lse
