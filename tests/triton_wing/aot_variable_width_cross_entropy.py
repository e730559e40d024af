"""The kernels of variable_width_cross_entropy as it launches them, over 4,096 tokens."""

from __future__ import annotations

import torch
import triton

from sparse_attn.triton_kernels import variable_width_cross_entropy as forward
from sparse_attn.triton_kernels import variable_width_cross_entropy_backward as backward
from sparse_attn.triton_kernels.lib import logit_gradients, matmul
from triton_wing.aot import Case

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOKENS = 4096
BANDS = {512: 2000, 128: 8000, 32: 40257}  # width → classes
PROJECTED = 160  # columns of all projected bands together


def label(dtype: torch.dtype) -> str:
    return POINTERS[dtype].removeprefix("*")


def _common(dtype: torch.dtype, width: int, classes: int) -> dict:
    return {
        "projected": POINTERS[dtype],
        "table": POINTERS[dtype],
        "target_band": "*i32",
        "count": TOKENS,
        "classes": classes,
        "width": width,
        "projected_row": PROJECTED if width < 512 else width,
        "projected_column": 1,
        "table_row": width,
        "table_column": 1,
    }


def _of_band(dtype: torch.dtype, width: int, classes: int, weighted: bool = False, candidate: int = 0):
    common = _common(dtype, width, classes)
    flags = {"SMOOTH": weighted, "WEIGHTED": weighted, "class_weight": "*fp32"}
    name = f"{label(dtype)} W{width}" + (" weighted" if weighted else "")
    name += f" candidate {candidate}" if candidate else ""
    block_n, block_v, block_k, warps, stages = forward.forward_configs(dtype, width)[candidate]
    splits, share = forward.class_splits(triton.cdiv(TOKENS, block_n), classes, block_v)
    yield Case(
        f"partial lse {name}",
        forward.partial_lse_kernel,
        common
        | flags
        | {"partial": "*fp32", "share": share, "first_split": 16, "splits": 48, "RESIDENT": width <= block_k,
           "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_K": block_k},
        num_warps=warps,
        num_stages=stages,
        candidate=candidate > 0,
    )  # fmt: skip
    gradient = (
        common | flags | {"factors": "*fp32", "lse": "*fp32", "target_row": "*i32", "band": 2, "share": 1024}
    )
    if width <= backward.FUSED_WIDTH[dtype]:
        streamed, own, block_w, warps, stages = backward.fused_configs(width)[candidate]
        sizes = {"partial": "*fp32", "BLOCK_W": block_w}
        yield Case(
            f"grad projected {name}",
            logit_gradients.grad_projected_kernel,
            gradient | sizes | {"BLOCK_N": own, "BLOCK_V": streamed},
            num_warps=warps,
            num_stages=stages,
            candidate=candidate > 0,
        )
        yield Case(
            f"grad table {name}",
            logit_gradients.grad_table_kernel,
            gradient | sizes | {"BLOCK_N": streamed, "BLOCK_V": own},
            num_warps=warps,
            num_stages=stages,
            candidate=candidate > 0,
        )
        return
    block_n, block_v, block_k, warps, stages = backward.chunk_configs(dtype)[candidate]
    del gradient["share"]
    yield Case(
        f"grad logits {name}",
        logit_gradients.grad_logits_kernel,
        gradient
        | {
            "grad": POINTERS[dtype],
            "first_class": 4096,
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
        num_stages=stages,
        candidate=candidate > 0,
    )


def _small():
    yield Case(
        "targets",
        forward.targets_kernel,
        {"target_band": "*i32", "target_row": "*i32", "target_weight": "*fp32", "targets": "*i64",
         "token_band": "*i32", "token_row": "*i32", "weight": "*fp32", "count": TOKENS, "vocabulary": 50257,
         "ignore_index": -100, "WEIGHTED": True, "BLOCK": 256},
        options={"debug": True, "sanitize_overflow": False},
    )  # fmt: skip
    yield Case(
        "target logits bf16 W512",
        forward.target_logits_kernel,
        _common(torch.bfloat16, 512, 2000)
        | {"target_logit": "*fp32", "target_row": "*i32", "band": 2, "BLOCK_N": 16, "BLOCK_K": 256},
    )
    yield Case(
        "loss",
        forward.loss_kernel,
        {"loss": "*fp32", "lse": "*fp32", "partial": "*fp32", "target_band": "*i32", "target_logit": "*fp32",
         "target_weight": "*fp32", "weight_sum": "*fp32", "count": TOKENS, "splits": 48, "vocabulary": 50257,
         "smoothing": 0.1, "SMOOTH": True, "WEIGHTED": True, "BLOCK": 32, "BLOCK_S": 32},
        num_warps=2,
    )  # fmt: skip
    yield Case(
        "factors",
        logit_gradients.factors_kernel,
        {"factors": "*fp32", "grad_loss": "*fp32", "grad_lse": "*fp32", "target_band": "*i32",
         "target_weight": "*fp32", "weight_sum": "*fp32", "count": TOKENS, "vocabulary": 50257, "smoothing": 0.1,
         "WEIGHTED": True, "BLOCK": 256},
    )  # fmt: skip


def _products():
    """hidden · projections, and its gradient: a transposed matrix on the left."""
    for dtype in (torch.float16, torch.float32):
        for name, rows, inner, a_row, a_column in (("a", TOKENS, 512, 512, 1), ("aT", 512, TOKENS, 1, 512)):
            block_m, block_n, block_k, warps = matmul.config(dtype, rows, PROJECTED)
            yield Case(
                f"matmul {name} {label(dtype)}",
                matmul.matmul_kernel,
                {"out": "*fp32", "a": POINTERS[dtype], "b": POINTERS[dtype], "rows": rows, "columns": PROJECTED,
                 "inner": inner, "inner_per_split": 512, "a_row": a_row, "a_column": a_column, "b_row": PROJECTED,
                 "b_column": 1, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
                num_warps=warps,
            )  # fmt: skip


def cases() -> list[Case]:
    some = {torch.bfloat16: BANDS, torch.float16: (32,), torch.float32: (512, 32)}
    found = [case for d in POINTERS for width in some[d] for case in _of_band(d, width, BANDS[width])]
    wide = [case for width in (768, 4096) for case in _of_band(torch.bfloat16, width, 4000)]
    tried = [(torch.bfloat16, 512), (torch.bfloat16, 128), (torch.bfloat16, 32), (torch.float32, 512)]
    wide += [
        case for d, width in tried for n in (1, 2) for case in _of_band(d, width, BANDS[width], candidate=n)
    ]
    return found + wide + [*_of_band(torch.bfloat16, 32, 40257, weighted=True), *_small(), *_products()]
