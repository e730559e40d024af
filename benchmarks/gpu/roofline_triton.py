"""The Triton kernels in the roofline: the main loop alone, whose products say what a turn does."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from benchmarks.gpu import sass
from benchmarks.gpu.gpus import GPUS, resident
from benchmarks.gpu.roofline_model import Row, main_loop, tensor_macs, times


@dataclass(frozen=True)
class TritonCase:
    op: str  # of tests/triton_wing/aot_<op>.py
    name: str  # of the case there
    unit: str
    products: float  # multiply-adds of a unit
    units: float
    cache_bytes: float
    memory_bytes: float
    # Of the case's sizes those whose product are the scores of a turn, of which a unit has 4,096: where groups of warps
    # make a product twice, the operations of a turn do not say how many turns there are.
    turn: tuple[str, ...] = ()


def triton_cases() -> list[TritonCase]:
    length, heads, dim = 16384, 16, 128
    scores = heads * length * (length + 1) / 2
    whole = 4.0 * heads * length * dim
    pairs = length * 512
    selected = ("4,096 scores", 4096 * dim, scores / 4096, scores * dim * 2 / 128, whole)
    gathered = (pairs, 4.0 * pairs * dim, whole)
    kept = 8 * 131072  # keys of 8 heads
    rows = 16.0 * kept
    tail, tailed = (
        "bf16 D128 H16/4 G16",
        (scores / 4096, scores * 4 * dim / 32, whole, ("BLOCK_M", "BLOCK_K")),
    )
    return [
        TritonCase("topk_select", "bf16 D128 K64 scores", *selected),
        TritonCase("topk_select", "bf16 D128 K256 scores", *selected),
        TritonCase(
            "gathered_attention", "forward, tile bf16 D128", "query and key", heads * 2 * dim, *gathered
        ),
        TritonCase(
            "gathered_attention", "queries, tile bf16 D128", "query and key", heads * 5 * dim, *gathered
        ),
        # The third product of the forward is the sum of the values that are left out; tiles of 32 rows read all keys.
        TritonCase("tail_attention", f"attend_tiles {tail}", "4,096 scores", 4096 * 3 * dim, *tailed),
        TritonCase("tail_attention", f"tile_queries {tail}", "4,096 scores", 4096 * 3 * dim, *tailed),
        TritonCase("tail_attention", f"tile_keys {tail}", "4,096 scores", 4096 * 4 * dim, *tailed),
        # A step beside 128k keys: D + 12 bytes of each, once for four query heads, which fill a quarter of a tile.
        TritonCase(
            "indexed_select",
            "select_tiles by the index bf16 D128 H32/8 K64",
            "4,096 scores",
            4096 * dim,
            rows / 4096,
            kept * (dim + 12.0),
            kept * (dim + 12.0),
            ("BLOCK_M", "BLOCK_N"),
        ),
    ]


def triton_rows(only: str = "") -> list[Row]:
    for folder in (sass.ROOT, sass.ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton_wing import aot

    found = []
    for wanted in triton_cases():
        label = f"triton {wanted.op} {wanted.name}"
        if only not in label:
            continue
        case = next(c for c in aot.cases(wanted.op) if c.name == wanted.name)
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
        built = triton.compile(case.source(), target=GPUTarget("cuda", 90, 32), options=options)
        kernel = sass.kernels_of(built.asm["cubin"])[0]
        loop = main_loop(kernel)
        most = loop.always.total() + loop.sometimes.total()
        turns = wanted.units * wanted.products / (tensor_macs(loop) * case.num_warps)
        if wanted.turn:
            turns = wanted.units * 4096 / math.prod(case.arguments[name] for name in wanted.turn)
        total = turns * most * case.num_warps
        milliseconds, bound = times(
            total,
            2 * wanted.units * wanted.products,
            lambda gpu: gpu.tensor,
            wanted.cache_bytes,
            wanted.memory_bytes,
        )
        found.append(
            Row(label, kernel.registers, kernel.stack, built.metadata.shared,
                resident(kernel.registers, built.metadata.shared, case.num_warps, GPUS[1]), loop.always.total(), most,
                total / wanted.units, wanted.unit, total, 2 * wanted.units * wanted.products, wanted.cache_bytes,
                wanted.memory_bytes, milliseconds, bound)
        )  # fmt: skip
    return found
