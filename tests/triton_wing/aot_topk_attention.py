"""The kernel of topk_attention that topk_select and gathered_attention do not have."""

from __future__ import annotations

from sparse_attn.triton_kernels import topk_attention
from sparse_attn.wings import triton as triton_wing  # noqa: F401  finds the kernels in a checkout
from triton_wing.aot import Case

LENGTH, HEADS = 16384, 16


def case(dtype: str, value_dim: int, budget: int, candidate: int = 0, *, scoring: bool = False) -> Case:
    """`scoring`: with a soft cap and sinks."""
    config = dict(topk_attention.value_configs(value_dim)[candidate])
    num_warps = config.pop("num_warps")
    arguments = {
        "value": f"*{dtype}",
        "indices": "*i32",
        "scores": "*fp32",
        "out": f"*{dtype}",
        "lse": "*fp32",
        "value_b": HEADS * LENGTH * value_dim,
        "value_h": LENGTH * value_dim,
        "value_t": value_dim,
        "value_d": 1,
        "outer_size": HEADS,
        "heads": HEADS,
        "repeat": 1,
        "query_length": LENGTH,
        "key_length": LENGTH,
        "budget": budget,
        "factor": 0.1,
        "bound": 0.2 if scoring else None,
        "sink_logits": "*fp32" if scoring else None,
        "VALUE_DIM": value_dim,
        "BLOCK_BUDGET": budget,
        **config,
    }
    name = f"values {dtype} Dv{value_dim} K{budget}" + (f" candidate {candidate}" if candidate else "")
    name += ", cap and sinks" if scoring else ""
    return Case(name, topk_attention._weigh_values, arguments, num_warps, candidate=candidate > 0)


def cases() -> list[Case]:
    shapes = [(64, 64), (128, 64), (128, 1024), (256, 64)]
    found = [case(dtype, *shape) for dtype in ("bf16", "fp32") for shape in shapes]
    for dtype in ("bf16", "fp32"):
        found += [case(dtype, 128, 64, n) for n in range(1, len(topk_attention.value_configs(128)))]
    found += [case(dtype, 128, 64, scoring=True) for dtype in ("bf16", "fp32")]
    return [*found, case("fp16", 128, 256), case("bf16", 128, 4096)]
