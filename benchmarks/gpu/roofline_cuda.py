"""The CUDA kernels in the roofline: how often each loop of a case turns, its bytes and its products."""

from __future__ import annotations

import math
from collections import Counter

from benchmarks.gpu import sass
from benchmarks.gpu.roofline_model import Case, Row, row_of
from benchmarks.gpu.sass import Kernel, Loop, count
from benchmarks.gpu.streams import Sample, rows_of_all_lengths

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
