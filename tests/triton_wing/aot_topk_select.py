"""The kernels of topk_select as they are launched for the sizes that matter."""

from __future__ import annotations

from dataclasses import replace

from sparse_attn.triton_kernels import topk_select
from sparse_attn.triton_kernels.lib.log_sum_exp import log_sum_exp
from sparse_attn.triton_kernels.lib.merge_pieces import merge_pieces
from sparse_attn.triton_kernels.lib.round_rows import round_rows
from sparse_attn.triton_kernels.lib.select_tiles import select_tiles
from sparse_attn.wings import triton as triton_wing  # noqa: F401  finds the kernels in a checkout
from triton_wing.aot import Case

LENGTH, HEADS = 16384, 16
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1}


def _strides(name: str, head_dim: int) -> dict[str, int]:
    strides = (HEADS * LENGTH * head_dim, LENGTH * head_dim, head_dim, 1)
    return {f"{name}_{axis}": stride for axis, stride in zip("bhtd", strides, strict=True)}


def _mask_strides(masked: bool) -> dict[str, int]:
    return {f"mask_{axis}": (1 if axis == "k" else LENGTH) if masked else 0 for axis in "bgqk"}


def _blocks(among: bool) -> dict[str, int | str | None]:
    return {
        "words": "*i32" if among else None,
        "table": None,
        "pages": 0,
        "PAGE": 1,
        "block_size": 64 if among else 1,
        "block_count": LENGTH // 64 if among else 0,
        "query_tile": 64 if among else 1,
        "query_tiles": LENGTH // 64 if among else 0,
    }


def _scales(dtype: str) -> dict[str, str | None]:
    return dict.fromkeys(("query_scale", "key_scale"), "*fp32" if dtype == "i8" else None)


def _of_queries(packed: bool) -> dict[str, int | str | None]:
    """Where each query of packed sequences has a first key and a causal offset of its own."""
    strides = {f"{name}_{axis}": n for name in ("starts", "offsets") for axis, n in (("b", LENGTH), ("t", 1))}
    tensors = dict.fromkeys(("starts", "offsets"), "*i64" if packed else None)
    return {**tensors, **(strides if packed else dict.fromkeys(strides, 0))}


def select(
    dtype: str,
    head_dim: int,
    budget: int,
    *,
    amd: bool = False,
    sharing: int = 1,
    masked: bool = False,
    split: bool = False,
    with_scores: bool = False,
    packed: bool = False,
    candidate: int = 0,
    capped: bool = False,
    weighted: bool = False,
    among: bool = False,
    **options,
) -> Case:
    queries = topk_select.FEW_QUERIES if split else LENGTH
    heavy = sharing > 1 or masked or split or among
    c = topk_select.configs(ELEMENT[dtype], head_dim, budget, amd, heavy, queries)[candidate]
    rows, chunk, step = topk_select._cut_shape(c, c.block_m, c.capacity)
    name = f"{dtype} D{head_dim} K{budget}" + (" amd" if amd else "")
    name += "" if sharing == 1 else f" indexer of {sharing}" if weighted else f" share {sharing}"
    name += " blocks" if among else ""
    name += (
        (" packed" if packed else "")
        + (" mask" if masked else "")
        + (" split" if split else "")
        + (" scores" if with_scores else "")
    )
    name += f" candidate {candidate}" if candidate else ""
    name += ", cap and sinks" if capped else ""
    arguments = {
        "query": f"*{dtype}",
        "key": f"*{dtype}",
        "mask": "*u8" if masked else None,
        "lengths": "*i32" if masked else None,
        **_blocks(among),
        **_scales(dtype),
        "per_head": "*fp32" if sharing > 1 or weighted else None,
        "redo": None,
        "slots": "*i64",
        "counts": "*i32",
        "thresholds": "*fp32",
        "queue": "*i32",
        "indices": "*i64" if split else "*i32",
        "scores": "*fp32" if with_scores else None,
        **_strides("query", head_dim),
        **_strides("key", head_dim),
        **_mask_strides(masked),
        **_of_queries(packed),
        "groups": HEADS // sharing,
        "query_length": queries,
        "key_length": LENGTH,
        "head_dim": head_dim,
        "budget": budget,
        "slack": c.slack,
        "causal_offset": 17,
        "window_offset": 15,
        "first_kept": 0,
        "factor": 0.1,
        "bound": 0.2 if capped else None,
        "tiles": 12345,
        "query_blocks": -(-queries // c.block_m),
        "splits": 8 if split else 1,
        "split_length": LENGTH,
        "INDEXED": False,
        "WEIGHTED": weighted,
        "SIGN": 1,
        "IS_CAUSAL": not split,
        "SHARING": sharing,
        "REPEAT": sharing,
        "SPLIT": split,
        "PACK": 1,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_D": head_dim,
        "CAPACITY": c.capacity,
        "ROWS": rows,
        "CHUNK": chunk,
        "STEP": step,
        "EDGE_STAGES": c.num_stages if masked or among else 1,
    }
    options.setdefault("targets", ("gfx942",) if amd else ("sm_80", "sm_90", "sm_100"))
    options["candidate"] = candidate > 0
    options["options"] = {} if amd else {"maxnreg": c.max_registers}
    return Case(name, select_tiles, arguments, c.num_warps, c.num_stages, **options)


def both(*arguments, **options) -> list[Case]:
    """The case as NVIDIA's GPUs have it, and as AMD's."""
    return [select(*arguments, amd=amd, **options) for amd in (False, True)]


def lse(
    dtype: str, head_dim: int, amd: bool, packed: bool, capped: bool = False, among: bool = False
) -> Case:
    c = topk_select.configs(ELEMENT[dtype], head_dim, 64, amd, True, LENGTH)[0]
    arguments = {
        "query": f"*{dtype}",
        "key": f"*{dtype}",
        "mask": None,
        "lengths": None,
        **_blocks(among),
        **_scales(dtype),
        "sink_logits": "*fp32" if capped else None,
        "shift": "*fp32",
        **_strides("query", head_dim),
        **_strides("key", head_dim),
        **_mask_strides(False),
        **_of_queries(packed),
        "heads": HEADS,
        "query_length": LENGTH,
        "key_length": LENGTH,
        "head_dim": head_dim,
        "causal_offset": 17,
        "window_offset": 15,
        "first_kept": 0,
        "factor": 0.1,
        "bound": 0.2 if capped else None,
        "query_blocks": 4 * LENGTH // c.block_m,
        "splits": 1,
        "IS_CAUSAL": True,
        "SHARING": 4,
        "REPEAT": 4,
        "PACK": 4,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_D": head_dim,
    }
    targets = ("gfx942",) if amd else ("sm_80", "sm_90", "sm_100")
    name = f"LSE {dtype} D{head_dim}" + (" amd" if amd else "") + (" packed" if packed else "")
    name += " blocks" if among else ""
    name += ", cap and sinks" if capped else ""
    return Case(name, log_sum_exp, arguments, c.num_warps, c.num_stages, targets=targets)


def merge(budget: int, splits: int, amd: bool, packed: bool) -> Case:
    c = topk_select.configs(2, 128, budget, amd, False, LENGTH)[0]
    capacity = 1 << (splits * budget - 1).bit_length()
    rows, chunk, step = topk_select._cut_shape(c, 32, capacity)
    arguments = {
        "slots": "*i64",
        "indices": "*i32",
        "scores": "*fp32",
        "wanted": None,
        **_of_queries(packed),
        "rows": LENGTH,
        "groups": HEADS,
        "query_length": 1,
        "key_length": LENGTH,
        "width": splits * budget,
        "budget": budget,
        "window_offset": 17,
        "first_kept": 0,
        "IS_CAUSAL": True,
        "CAPACITY": capacity,
        "ROWS": rows,
        "CHUNK": chunk,
        "STEP": step,
    }
    targets = ("gfx942",) if amd else ("sm_80", "sm_90", "sm_100")
    name = f"merge K{budget} of {splits}" + (" amd" if amd else "") + (" packed" if packed else "")
    return Case(name, merge_pieces, arguments, c.num_warps, 2, targets=targets)


def rounding(head_dim: int) -> Case:
    arguments = {
        "codes": "*i8", "scales": "*fp32", "rows": "*bf16",
        **dict(zip(("rows_b", "rows_h", "rows_t", "rows_d"), _strides("rows", head_dim).values(), strict=True)),
        "programs": HEADS, "heads": HEADS, "length": LENGTH, "DIM": head_dim, "PITCH": head_dim,
        "BLOCK_DIM": head_dim, "BLOCK_T": 2048 // head_dim,
    }  # fmt: skip
    return Case(f"rounding bf16 D{head_dim}", round_rows, arguments)


def cases() -> list[Case]:
    found = []
    for dtype, head_dim, budget in (
        ("bf16", 128, 64),
        ("bf16", 128, 4096),
        ("bf16", 64, 64),
        ("fp32", 64, 64),
        ("fp32", 128, 256),
        ("bf16", 256, 64),
    ):
        found += both(dtype, head_dim, budget, with_scores=head_dim == 128)
    found += both("bf16", 128, 64, masked=True)
    found += both("bf16", 128, 64, split=True)
    found += both("bf16", 128, 64, packed=True)
    found += both("bf16", 128, 64, sharing=4)
    found += both("bf16", 64, 256, sharing=4, capped=True)
    for amd in (False, True):
        for dtype in ("bf16", "fp32"):
            some = topk_select.configs(ELEMENT[dtype], 64, 64, amd, False, LENGTH)
            found += [select(dtype, 64, 64, amd=amd, candidate=n) for n in range(1, len(some))]
    for amd in (False, True):
        for packed in (False, True):
            found += [lse("bf16", 128, amd, packed), merge(64, 16, amd, packed)]
        found.append(lse("bf16", 128, amd, False, capped=True))
        found.append(lse("i8", 128, amd, False, among=True))
    found += both("i8", 128, 64)
    found += both("i8", 64, 512, sharing=32, weighted=True)
    found += both("bf16", 128, 64, among=True)
    found.append(rounding(128))
    for others in (
        both("bf16", 128, 256, with_scores=True),
        both("bf16", 128, 1024, with_scores=True),
        both("bf16", 128, 2048, with_scores=True),
        both("fp16", 64, 256),
        both("bf16", 64, 256, sharing=4),
        both("bf16", 64, 512, sharing=4, weighted=True),
        both("bf16", 256, 64, masked=True),
        both("bf16", 256, 64, sharing=4),
        both("bf16", 256, 256, among=True),
        both("bf16", 256, 4096),
        both("bf16", 256, 64, split=True),
    ):  # between those above: by hand alone
        found += [replace(case, candidate=True) for case in others]
    return found
