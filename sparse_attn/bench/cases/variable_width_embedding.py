"""`variable_width_embedding` against nn.Embedding, eager adaptive input, and torch.compile of all bands."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from sparse_attn.bench.bands import (
    BAND_SIZES,
    DIM,
    KINDS,
    VOCABULARY,
    WIDTHS,
    BandCase,
    BandOp,
    Bands,
    all_bands,
    eager,
    make,
)
from sparse_attn.bench.correctness import assert_near
from sparse_attn.bench.registry import Comparison, Work

COUNT = 16384
# A lookup writes 32 MiB, which glibc asks of the system anew for every call and the system clears first; an allocator
# that keeps memory spares that. The forward is measured both ways.
KEPT = "glibc.malloc.mmap_threshold=4294967295:glibc.malloc.trim_threshold=4294967295"
# rival → the least acceptable time over ours
TARGETS = {"forward": {"eager": 4.0, "embedding": 1 / 1.3}, "both": {"eager": 3.0, "compiled": 1.0}}


class VariableWidthEmbedding(BandOp):
    name = "variable_width_embedding"
    setting = f"V={VOCABULARY}, D={DIM}, bands {BAND_SIZES} of widths {WIDTHS}, {COUNT} ids, float32"
    labels: ClassVar = {
        "ours": "sparse_attn",
        "ours_sparse": "sparse_attn, sparse gradients",
        "embedding": "nn.Embedding (dense table)",
        "embedding_sparse": "nn.Embedding, sparse gradients",
        "eager": "eager adaptive input",
        "compiled": "torch.compile of all bands",
    }

    def problem(self, contender: str, case: BandCase) -> str | None:
        if contender.endswith("sparse") and case.direction == "forward":
            return "sparse gradients make no difference to the forward"
        return None

    def inputs(self, case: BandCase) -> Bands:
        return make(case.ids, COUNT)

    def prepare(self, contender: str, case: BandCase, inputs: Bands) -> Work:
        sparse = contender.endswith("sparse")
        if contender.startswith("embedding"):
            return Work(lambda table: F.embedding(inputs.ids, table, sparse=sparse), (_dense(inputs),))
        if contender == "eager":
            return Work(partial(eager, inputs), inputs.leaves)
        if contender == "compiled":
            compiled = torch.compile(partial(all_bands, inputs), fullgraph=True, dynamic=False)
            return Work(compiled, inputs.leaves)
        maps = inputs.token_band, inputs.token_row

        def ours(*leaves: Tensor) -> Tensor:
            return sparse_attn.variable_width_embedding(
                inputs.ids, *inputs.split(leaves), *maps, sparse=sparse
            )

        return Work(ours, inputs.leaves)

    def check(self, contender: str, case: BandCase, inputs: Bands, work: Work) -> None:
        check_lookup(f"{contender} on {case}", inputs, work, contender.startswith("embedding"), 1e-5)

    def comparisons(self, quick: bool) -> list[Comparison]:
        rounds, rivals = (3 if quick else 15), tuple(self.labels)[1:]
        rows = []
        for kind in KINDS:
            forward, both = BandCase(self.name, kind), BandCase(self.name, kind, "both")
            few = tuple(n for n in rivals if not n.endswith("sparse"))
            row = Comparison(forward, few, TARGETS["forward"], rounds=rounds, seconds=60)
            rows += [row, replace(row, case=both, rivals=rivals, targets=TARGETS["both"])]
            if platform.libc_ver()[0] == "glibc":
                kept = replace(forward, kept=True)
                rows.append(replace(row, case=kept, targets={}, environment=(("GLIBC_TUNABLES", KEPT),)))
        return rows


def _dense(bands: Bands) -> Tensor:
    with torch.no_grad():
        return bands.dense(bands.leaves)


def check_lookup(what: str, bands: Bands, work: Work, dense: bool, tolerance: float) -> None:
    """Output and gradients against the dense table in float64; `dense`: the leaf is that table."""
    leaves = tuple(t.detach().requires_grad_() for t in work.leaves)
    wide = tuple(t.detach().double().requires_grad_() for t in bands.leaves)
    table = bands.dense(wide)
    want = table[bands.ids]
    out = work.forward(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(want.shape, generator=generator).to(out.device, out.dtype)
    assert_near(f"{what}: output", out, want, tolerance)
    grads = torch.autograd.grad(out, leaves, grad_out)
    wanted = torch.autograd.grad(want, (table,) if dense else wide, grad_out.double())
    for got, true in zip(grads, wanted, strict=True):
        assert_near(f"{what}: gradient", got.to_dense() if got.is_sparse else got, true, tolerance)


OP = VariableWidthEmbedding()
