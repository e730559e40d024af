"""Speed by count, where no GPU is: `python -m benchmarks.gpu.roofline [--only TEXT] [--json FILE]`.

For each kernel and case: what one warp issues, read from the machine code (loops by their back edges, sass.py), and how
often each loop turns, from the sizes; registers, spills, shared memory and the warps that fit; bytes and products by
formula; and the time that follows on each GPU, the longest of four: instructions at four a clock and multiprocessor,
products, second-level cache, memory. Nothing here is measured: such a time is a floor.

Machine code is that of sm_90 for all GPUs. The rates of mma.sync, which the kernels of csrc/cuda use, are 62% of
wgmma's on Hopper, and taken as half of those on Blackwell; the cache's rates are rounded from what others measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu import sass
from benchmarks.gpu.gpus import GPUS, Gpu, resident
from benchmarks.gpu.sass import Kernel, Loop, count
from benchmarks.gpu.streams import Sample, rows_of_all_lengths


@dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    label: str
    source: str  # of csrc/cuda/kernels
    kernel: str  # its demangled name
    unit: str  # what is counted: "4,096 scores", "query and key"
    units: float  # how many there are of them
    warps: int  # of a block
    blocks: float  # that do the work counted by `turns`
    shared: int  # bytes of a block
    turns: Callable[[Loop, tuple[Loop, ...]], float]  # of a loop, for each turn of those around it
    operations: float  # of products
    halves: bool  # on tensor cores
    cache_bytes: float
    memory_bytes: float
    # Of a block that a turn of a loop may pass by, with the loops around it.
    weight: Callable[[Loop, Counter, tuple[Loop, ...]], float]


@dataclass
class Row:
    label: str
    registers: int
    stack: int
    shared: int
    warps: int  # of a multiprocessor of an H100, by registers and shared memory
    loop: int  # instructions of the main loop that every turn issues
    loop_most: int  # with all that a turn may pass by
    per_unit: float  # warp instructions
    unit: str
    instructions: float  # of warps, in all
    operations: float
    cache_bytes: float
    memory_bytes: float
    milliseconds: dict[str, float]
    bound: dict[str, str]


def issued(loops: list[Loop], case: Case, around: tuple[Loop, ...] = ()) -> float:
    """Instructions of one warp in these loops, for one turn of those around them."""
    total = 0.0
    for loop in loops:
        turns = case.turns(loop, around)
        if turns:
            own = loop.always.total() + sum(case.weight(loop, b, around) * b.total() for b in loop.branches)
            total += turns * (own + issued(loop.inner, case, (*around, loop)))
    return total


def main_loop(kernel: Kernel) -> Loop:
    """The loop with the most tensor work, else with the most multiply-adds."""

    def products(loop: Loop) -> tuple[float, ...]:
        return tensor_macs(loop), loop.count("FFMA")

    return max(kernel.all_loops(), key=products)


def tensor_macs(loop: Loop) -> float:
    """Multiply-adds of one warp's turn on the tensor cores."""
    total = 0.0
    for op, n in (loop.always + loop.sometimes).items():
        if op.startswith("HMMA.16816"):
            total += n * 16 * 8 * 16
        elif op.startswith("IMMA.16832"):
            total += n * 16 * 8 * 32
        elif match := re.match(r"[HI]GMMA\.64x(\d+)x(\d+)", op):
            total += n * 64 * int(match[1]) * int(match[2]) / 4  # four warps have a part each
    return total


def times(
    instructions: float, operations: float, rate: Callable[[Gpu], float], cache: float, memory: float
) -> tuple[dict, dict]:
    milliseconds, bound = {}, {}
    for gpu in GPUS:
        clocks = gpu.processors * gpu.clock * 1e9
        terms = {
            "issue": instructions / (4 * clocks),
            "product": operations / (rate(gpu) * clocks),
            "cache": cache / (gpu.cache * 1e12),
            "memory": memory / (gpu.memory * 1e12),
        }
        bound[gpu.name] = max(terms, key=terms.__getitem__)
        milliseconds[gpu.name] = 1e3 * terms[bound[gpu.name]]
    return milliseconds, bound


def row_of(case: Case, kernel: Kernel) -> Row:
    per_warp = issued(kernel.loops, case)
    total = per_warp * case.warps * case.blocks
    loop = main_loop(kernel)
    milliseconds, bound = times(
        total,
        case.operations,
        lambda gpu: gpu.legacy if case.halves else gpu.multiply_add,
        case.cache_bytes,
        case.memory_bytes,
    )
    return Row(
        case.label, kernel.registers, kernel.stack, case.shared,
        resident(kernel.registers, case.shared, case.warps, GPUS[1]), loop.always.total(),
        loop.always.total() + loop.sometimes.total(), total / case.units, case.unit, total, case.operations,
        case.cache_bytes, case.memory_bytes, milliseconds, bound,
    )  # fmt: skip


# ---- selection


def _streams(loop: Loop) -> bool:
    """Whether it goes over tiles of keys: products, and candidates are appended."""
    return loop.count("STG.E.64") > 0 and any(inner.count("HMMA") or inner.count("FFMA") for inner in loop)


def selection(
    dtype: str,
    dim: int,
    budget: int,
    length: int = 16384,
    heads: int = 16,
    queries: int | None = None,
    share: int = 1,
    sampled: bool = True,
    kv_heads: int | None = None,
    packed: bool = True,
) -> Case:
    """A selection per head, or for `share` of them: causal, or of a few queries (decoding)."""
    halves, element = dtype != "float", 2 if dtype != "float" else 4
    causal, resident_queries = queries is None, halves and share == 1
    tile, rows = 64, queries or length
    capacity = budget + min(max(min(2 * budget, 1024), budget, 128), 4096) + tile
    kv_heads = kv_heads or heads
    pack = (
        heads // kv_heads if resident_queries and rows < tile and packed else 1
    )  # heads in the rows of one tile
    sets = heads // share // pack
    block_tiles = sets * math.ceil(pack * rows / tile)
    splits = (
        1 if causal else min(3 * 132 // block_tiles, length // max(4 * budget, 512), max(1, 8192 // budget))
    )
    key_tiles = (length / tile + 1) / 2 if causal else length / tile / splits
    sample = Sample.of(budget) if sampled and resident_queries and splits == 1 else None
    row = rows_of_all_lengths(length / splits, causal, budget, capacity - tile, sample)
    streamed_tiles = (
        key_tiles * row.scored / (length / 2 if causal else length / splits)
    )  # all passes together
    # Four keys of each of eight queries (float32: of two, on 16 lanes each) are a branch.
    group = row.grouped / row.scored
    cuts = max(row.cuts, 1e-9)
    real = 1.0 if causal else pack * rows / tile  # of a tile's rows, all but a few are empty when decoding

    def turns(loop: Loop, around: tuple[Loop, ...]) -> float:
        if not around:
            return 1.0  # over tiles of queries
        within = any(_streams(each) for each in around)
        if _streams(loop):
            return streamed_tiles / row.passes
        if not within and any(_streams(inner) for inner in loop.inner):
            return row.passes
        if loop.count("LDG.E.U16") and (resident_queries or not loop.count("LDGSTS")):
            return 0.0  # rows that are not of whole vectors
        if loop.count("LDG.E.U8") or loop.count("LD.E.U8"):
            return 0.0  # masks
        if loop.count("STS") and loop.count("LDG") and not loop.count("LDGSTS"):
            return 0.0
        if loop.count("FFMA"):
            return 8.0  # of 32 steps four are unrolled
        if loop.count("HMMA") or any(inner.count("FFMA") for inner in loop.inner):
            return dim / 32
        if any(inner.count("HMMA") or inner.count("FFMA") for inner in loop):
            return share
        if loop.count("LDGSTS"):
            return 64 * 32 * element / 16 / 128
        if loop.count("REDUX"):
            return 16 * real * row.cuts / streamed_tiles if within else 16 * real
        if loop.count("SHFL.UP"):
            return 1.5 if within else 2.5  # rounds of five bits
        if loop.count("VOTE") and loop.count("POPC"):
            # At the end candidates are written as indices, or as a part for the merge.
            if within:
                return row.kept_chunks / cuts
            return row.last_chunks if (loop.count("STG.E.64") > 0) == (splits > 1) else 0.0
        if loop.count("ATOMS") or loop.count("LDG.E.64"):
            return row.cut_chunks / cuts if within else row.last_chunks
        if loop.count("STG") and not loop.count("REDUX"):
            return 0.0  # empty slots
        return 1.0

    def weight(loop: Loop, branch: Counter, around: tuple[Loop, ...]) -> float:
        if count(branch, "LDG.E.U8") or count(branch, "MUFU.RCP"):
            return 0.0  # a mask, and where a row of it lies
        if count(branch, "LDS.128"):
            return 2 / key_tiles if causal else 0.0  # the diagonal
        if count(branch, "LDG.E.64"):  # a row that is read again
            return row.long_cuts / cuts if any(_streams(each) for each in around) else row.last_long
        if count(branch, "LDG.E.U16") or (
            not resident_queries and loop.count("LDGSTS") and count(branch, "STS")
        ):
            return 0.0
        if loop.count("LDG.E.64"):  # what stands apart there: ties, and keys that are kept always
            return float(count(branch, "STG") > 0)
        return group if count(branch, "STG.E.64") else 1.0

    tiles_scored = block_tiles * splits * streamed_tiles
    scores = block_tiles * splits * key_tiles * tile * tile * share
    bytes_of_tile = tile * dim * element
    kernel = (
        f"select_halves_kernel<{dtype}, {dim}>"
        if resident_queries
        else f"select_gathered_kernel<{dtype}, false>"
    )
    shared = 2224 + (2 * tile * (2 * dim + 16) if resident_queries else 4 * tile * (32 * element + 16))
    tiles_read = 1 if resident_queries else 2 * share  # else queries are read again for every tile of keys
    name = {"BFloat": "bf16", "Half": "fp16", "float": "fp32"}[dtype]
    size = f"T{length // 1024}k causal" if causal else f"Tq{queries} Tk{length // 1024}k, {splits} pieces"
    size += "" if packed else ", heads apart"
    grouped = f"/{kv_heads}" if kv_heads < heads else ""
    sharing = f", {share} heads share" if share > 1 else "" if sampled else ", no sample"
    read = tiles_read * tiles_scored * bytes_of_tile
    return Case(
        f"topk_select {name} H{heads}{grouped} D{dim} K{budget} {size}{sharing}",
        f"topk_select{'' if resident_queries else '_gathered'}", kernel, "4,096 scores", scores / 4096, 4,
        block_tiles * splits, shared, turns, 2.0 * tiles_scored * tile * tile * share * dim, halves,
        read + 32.0 * real * row.appended * block_tiles * splits * tile,
        (kv_heads * length + heads * rows) * dim * element + 4.0 * heads // share * rows * budget, weight,
    )  # fmt: skip


def normalisers(dim: int, length: int = 16384, heads: int = 16) -> Case:
    """The log-sum-exp of every head, which heads that share a selection need first; causal."""
    tile, key_tiles = 64, (length / 64 + 1) / 2

    def turns(loop: Loop, around: tuple[Loop, ...]) -> float:
        if loop.count("MUFU.EX2") and loop.inner:
            return key_tiles
        if loop.count("HMMA"):
            return dim / 32
        return 0.0 if around else 1.0  # rows that are not of whole vectors, and masks

    def weight(loop: Loop, branch: Counter, around: tuple[Loop, ...]) -> float:
        if any(count(branch, op) for op in ("LDG.E.U16", "LDG.E.U8", "STS")):
            return 0.0
        return 2 / key_tiles if count(branch, "LDS.128") else 1.0

    blocks = heads * length / tile
    scores = blocks * key_tiles * tile * tile
    return Case(
        f"topk_select bf16 H{heads} D{dim} T{length // 1024}k causal, log-sum-exp", "topk_select_gathered",
        "score_lse_kernel<BFloat, false>", "4,096 scores", scores / 4096, 4, blocks, 2224 + 4 * tile * 80, turns,
        2.0 * scores * dim, True, 2 * blocks * key_tiles * tile * dim * 2, 4.0 * heads * length * dim, weight,
    )  # fmt: skip


# ---- gathered attention


def _plain(loop: Loop, branch: Counter, around: tuple[Loop, ...]) -> float:
    """Rows are whole vectors, and sums are not made by atomics."""
    return float(not any(count(branch, op) for op in ("LDG.E.U16", "RED", "ATOMG")))


def tiles(backward: bool, heads: int = 64, budget: int = 2048, dim: int = 128, length: int = 16384) -> Case:
    """Heads that share their keys, on tensor cores: a block is one query and 64 heads."""
    slots = 32 if backward else 64

    def turns(loop: Loop, around: tuple[Loop, ...]) -> float:
        if not around:
            return budget / slots if loop.count("BAR") and loop.inner else 1.0
        if loop.count("LDGSTS"):
            return slots / 8
        if loop.count("HMMA"):
            return heads / 16 if backward else slots / 32
        return 2.0  # two tasks of a warp: 16 slots and 64 columns each

    pitch = 2 * dim + 16
    stage = 2 * (2 * slots * pitch + 4 * slots)
    shared = stage + heads * (pitch * (2 if backward else 1) + (2 * 80 + 8 if backward else 0))
    pairs, places = length * heads * budget, 4.0 * length * budget * 2 * dim if backward else 0.0
    return Case(
        f"gathered_attention {'backward, queries' if backward else 'forward'} bf16 H{heads}/1 D{dim} K{budget}",
        f"gathered_attention{'_backward' if backward else ''}_tiles",
        "attend_backward_tiles_kernel<BFloat, false>" if backward else f"attend_tiles_kernel<BFloat, {dim}, false>",
        "query and key", length * budget, 4, length, shared, turns,
        (10.0 if backward else 4.0) * pairs * dim, True, 4.0 * length * budget * dim,
        4.0 * length * (1 + heads) * dim + places, _plain,
    )  # fmt: skip


def vectors(which: str, heads: int = 16, budget: int = 512, dim: int = 128, length: int = 16384) -> Case:
    """Heads alone: a warp has one query or, of the pass over keys, a block one key."""
    ahead = 4 if which == "forward" else 2
    names = {
        "forward": ("gathered_attention", "attend_kernel<BFloat, 1, false>"),
        "backward, queries": (
            "gathered_attention_backward",
            "attend_backward_query_kernel<BFloat, 1, false>",
        ),
        "backward, keys": ("gathered_attention_backward", "attend_backward_key_kernel<BFloat, false>"),
    }
    keys = which == "backward, keys"
    lanes = dim // 8

    def turns(loop: Loop, around: tuple[Loop, ...]) -> float:
        if loop.count("SHFL.BFLY") and not loop.count("LDG"):
            return math.log2(lanes) if around else 1.0
        if not around:
            return (1.0 if keys else budget / 32) if loop.inner else 1.0
        return budget / (ahead * 256 / lanes) if keys else lanes / ahead

    pairs = length * heads * budget
    return Case(
        f"gathered_attention {which} bf16 H{heads} D{dim} K{budget}", *names[which], "query and key", pairs,
        8 if keys else 4, length * heads / (1 if keys else 4), 8 * 8 * lanes * 8 if keys else 0, turns,
        (4.0 if which == "forward" else 8.0) * pairs * dim, False, 4.0 * pairs * dim,
        8.0 * length * heads * dim, _plain,
    )  # fmt: skip


def cuda_cases() -> list[Case]:
    return [
        selection("BFloat", 128, 64), selection("BFloat", 128, 128),
        selection("BFloat", 128, 512), selection("BFloat", 128, 512, sampled=False),
        selection("BFloat", 128, 2048), selection("BFloat", 64, 64),
        selection("BFloat", 256, 64), selection("float", 128, 64), selection("BFloat", 128, 64, share=4),
        normalisers(128),
        selection("BFloat", 128, 64, 131072, queries=1), selection("BFloat", 128, 512, 131072, queries=1),
        selection("BFloat", 128, 64, 131072, heads=32, queries=1, kv_heads=8),
        selection("BFloat", 128, 64, 131072, heads=32, queries=1, kv_heads=8, packed=False),
        tiles(False), tiles(True), vectors("forward"), vectors("backward, queries"), vectors("backward, keys"),
    ]  # fmt: skip


def cuda_rows(only: str = "") -> list[Row]:
    found = []
    kernels: dict[str, dict[str, Kernel]] = {}
    for case in cuda_cases():
        if only not in f"cuda {case.label}":
            continue
        if case.source not in kernels:
            read = sass.kernels_of(sass.compiled(sass.KERNELS / f"{case.source}.cu"))
            kernels[case.source] = {kernel.name: kernel for kernel in read}
        row = row_of(case, kernels[case.source][case.kernel])
        row.label = f"cuda {row.label}"
        found.append(row)
    return found


# ---- Triton: the main loop alone, whose products say what a turn does


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


def table(rows: list[Row]) -> str:
    width = max(len(r.label) for r in rows)
    lines = [
        f"{'':{width}}  regs stack  shared warps    loop    most   warp instructions    TFLOP   L2 GB  HBM GB"
        + "".join(f"{g.name + ' ms':>16}" for g in GPUS)
    ]
    for r in rows:
        times_ = "".join(f"{f'{r.milliseconds[g.name]:.3g} {r.bound[g.name]}':>16}" for g in GPUS)
        lines.append(
            f"{r.label:{width}} {r.registers:5} {r.stack:5} {r.shared:7} {r.warps:5} {r.loop:7} {r.loop_most:7} "
            f"{r.per_unit:7.4g} / {r.unit:13} {r.operations / 1e12:5.3g} {r.cache_bytes / 1e9:7.3g} "
            f"{r.memory_bytes / 1e9:7.3g}{times_}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.roofline", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose label has this text, such as topk_select")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args()
    rows = []
    for name, of in (("cuda", cuda_rows), ("triton", triton_rows)):
        try:
            rows += of(args.only)
        except (FileNotFoundError, ImportError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not rows:
        print(f"no case has {args.only!r} in its label")
        return 1
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
