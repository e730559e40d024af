"""The launches of gathered_attention, forward and backward: B1 T16k K512, 16 query heads."""

from __future__ import annotations

from sparse_attn.triton_kernels import gathered_attention as forward
from sparse_attn.triton_kernels import gathered_attention_backward as backward
from sparse_attn.triton_kernels.lib import gathered_attention_sums as sums
from sparse_attn.triton_kernels.lib.key_lists import walk_entries
from triton_wing import aot

LENGTH, HEADS, BUDGET = 16384, 16, 512


def strides(name: str, heads: int, last: str, dim: int) -> dict[str, int]:
    """Of a contiguous [1, heads, LENGTH, dim], as the kernels name them."""
    axes = ("b", "h", "t", last)
    return dict(zip([f"{name}_{a}" for a in axes], (heads * LENGTH * dim, LENGTH * dim, dim, 1), strict=True))


def common(dtype: str, kv_heads: int, groups: int, dim: int) -> dict:
    """The arguments that every kernel has, and more."""
    indices = strides("indices", groups, "k", BUDGET)
    indices["indices_g"] = indices.pop("indices_h")
    return {
        **dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}"),
        "indices": "*i32", "lse": "*fp32",
        **strides("query", HEADS, "d", dim), **strides("key", kv_heads, "d", dim),
        **strides("value", kv_heads, "d", dim), **indices,
        "kv_heads": kv_heads, "groups": groups, "key_length": LENGTH, "budget": BUDGET, "factor": 0.1,
        "bound": None, "sink_logits": None,
        "DIM": dim, "VALUE_DIM": dim, "BLOCK_DIM": dim, "BLOCK_VALUE": dim,
    }  # fmt: skip


def gradients(dtype: str, kv_heads: int, groups: int, dim: int) -> dict:
    return {
        **common(dtype, kv_heads, groups, dim),
        **strides("grad", HEADS, "d", dim),
        "grad_out": f"*{dtype}",
        "grad_lse": None,
        "grad_query": f"*{dtype}",
        "rows": "*fp32",
        "grad_key": "*fp32",
        "grad_value": "*fp32",
        "order": "*i32",
        "offsets": "*i32",
        "key_entries": f"*{dtype}",
        "value_entries": f"*{dtype}",
        "key_sink": f"*{dtype}",
        "value_sink": f"*{dtype}",
        "scale": 0.1,
        "ATOMICS": False,
        "ADD": True,
        "query_length": LENGTH,
        "first_query": 2048,
        "rows_half": HEADS * LENGTH,
        "entries": 2048 * BUDGET,
    }


def case(name: str, kernel, arguments: dict, configs: list[dict], candidate: int = 0, **others) -> aot.Case:
    config = dict(configs[candidate])
    options = {n: config.pop(n) for n in ("num_warps", "num_stages")}
    arguments = {**arguments, **config}
    known = {p.name for p in kernel.params}
    others["candidate"] = candidate > 0
    name += f", candidate {candidate}" if candidate else ""
    return aot.Case(name, kernel, {n: v for n, v in arguments.items() if n in known}, **options, **others)


def launches(dtype: str, dim: int) -> list[tuple]:
    """(name, kernel, arguments, configurations) of 16 heads that share a selection and a key head, then alone."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    label, sums_of = f"{dtype} D{dim}", sums.sum_configs(dim, dim)
    unit = {"units": 1, "tiles": 1, "shared": HEADS, "programs": 16}
    both = {**common(dtype, 1, 1, dim), **unit}
    configs = forward.tile_configs(dtypes[dtype], HEADS, dim, dim)
    found = [(f"forward, tile {label}", forward._tile, both, configs)]
    if backward.takes_tiles(dtypes[dtype], HEADS):
        both = {**gradients(dtype, 1, 1, dim), **unit}
        configs = backward.tile_configs(HEADS, dim, dim)
        found.append((f"queries, tile {label}", backward._tile_queries, both, configs))
        found.append((f"keys, tile {label}", sums.sum_entries, both, sums_of))
    alone = {"heads": HEADS, "programs": 16}
    both = {**common(dtype, HEADS, HEADS, dim), **alone}
    configs = forward.vector_configs(dim, dim, 1024 if dtype == "fp32" else 2048)
    found.append((f"forward, vector {label}", forward._vector, both, configs))
    both = {**gradients(dtype, HEADS, HEADS, dim), **alone}
    configs = forward.vector_configs(dim, dim, 4096)
    found.append((f"queries, vector {label}", backward._vector_queries, both, configs))
    return [*found, (f"keys, vector {label}", sums.sum_queries, both, sums_of)]


def lists(written: bool) -> aot.Case:
    """Entries by key of 2,048 queries: counted, or written."""
    indices = {**strides("indices", HEADS, "k", BUDGET), "indices_g": LENGTH * BUDGET}
    del indices["indices_h"]
    arguments = {
        "indices": "*i32", "counts": "*i32", "order": "*i32" if written else None, **indices, "sets": HEADS,
        "groups": HEADS, "first_query": 2048, "queries": 2048, "size": 64, "budget": BUDGET, "first_key": 0,
        "keys": LENGTH, "BLOCK": BUDGET,
    }  # fmt: skip
    return aot.Case(f"entries, {'written' if written else 'counted'}", walk_entries, arguments)


def cases() -> list[aot.Case]:
    import torch

    found = [lists(written) for written in (True, False)]
    for dtype, dim in (
        ("bf16", 128),
        ("bf16", 64),
        ("fp16", 128),
        ("fp32", 64),
        ("fp32", 128),
        ("bf16", 256),
    ):
        rare = {"targets": ("sm_90", "gfx942")} if dtype == "fp16" or dim == 256 else {}
        for launch in launches(dtype, dim):
            found.append(case(*launch, **rare))
            if (dtype, dim) in (("bf16", 128), ("fp32", 64)):
                found += [case(*launch, candidate) for candidate in range(1, len(launch[3]))]
    unit = {"units": 1, "tiles": 2, "shared": HEADS, "programs": 16}
    arguments = {
        **gradients("bf16", 1, 1, 128),
        **unit,
        "key_sink": "*fp32",
        "value_sink": "*fp32",
        "ATOMICS": True,
    }
    configs = backward.tile_configs(HEADS, 128, 128)
    found.append(case("queries, tile bf16 D128, atomics", backward._tile_queries, arguments, configs))
    for heads in (32, 64):
        unit = {"units": 1, "tiles": 1, "shared": heads, "programs": 16}
        arguments = {**gradients("bf16", 1, 1, 128), **unit}
        configs = forward.tile_configs(torch.bfloat16, heads, 128, 128)
        found.append(case(f"forward, tile bf16 D128, {heads} heads", forward._tile, arguments, configs))
        configs = backward.tile_configs(heads, 128, 128)
        found.append(
            case(f"queries, tile bf16 D128, {heads} heads", backward._tile_queries, arguments, configs)
        )
    scoring = {"bound": 0.2, "sink_logits": "*fp32"}
    for dtype, dim in (("bf16", 128), ("fp32", 128), ("bf16", 256)):
        for name, kernel, arguments, configs in launches(dtype, dim):
            if kernel is not sums.sum_entries:
                found.append(case(f"{name}, cap and sinks", kernel, arguments | scoring, configs))
    # One batch entry, one head, one key: every such number is compiled in.
    ones = {"heads": 1, "shared": 1, "units": 1, "tiles": 1, "programs": 1, "key_length": 1, "budget": 1}
    ones |= {"query_length": 1, "first_query": 0, "entries": 1, "rows_half": 1}
    arguments = {**gradients("fp32", 1, 1, 16), **ones, "grad_lse": "*fp32"}
    for kernels, configs in (
        ((forward._vector, backward._vector_queries), forward.vector_configs(16, 16, 2048)),
        ((forward._tile, backward._tile_queries), backward.tile_configs(1, 16, 16)),
        ((sums.sum_entries, sums.sum_queries), sums.sum_configs(16, 16)),
    ):
        for kernel in kernels:
            found.append(case(f"ones, {kernel.__name__}", kernel, arguments, configs, targets=("sm_90",)))
    return found
