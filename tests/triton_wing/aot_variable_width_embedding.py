"""The kernels of variable_width_embedding as it launches them."""

from __future__ import annotations

import torch
import triton

from sparse_attn.triton_kernels import variable_width_embedding as forward
from sparse_attn.triton_kernels import variable_width_embedding_backward as backward
from sparse_attn.triton_kernels.lib import run_sums
from triton_wing.aot import Case

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOKENS = 16384
# D, rows and widths of the bands; a band as wide as the model is not projected
MODELS = {
    "D512": (512, (2000, 8000, 40257), (512, 128, 32)),
    "D768": (768, (2000, 8000, 40257), (768, 192, 48)),
    "D4096": (4096, (4000, 24000, 100000), (4096, 1024, 256)),
}
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)


def label(dtype: torch.dtype) -> str:
    return POINTERS[dtype].removeprefix("*")


def _suffix(candidate: int) -> str:
    return f" candidate {candidate}" if candidate else ""


def _forward_cases():
    for name, (dim, rows, widths) in MODELS.items():
        for dtype in DTYPES if name == "D512" else HALF[:1]:
            for count in (TOKENS, 16) if dtype == HALF[0] else (TOKENS,):
                projected = [w for w in widths if w != dim]
                configs = forward.forward_configs(dtype, count, dim, max(projected))
                arguments = {
                    "out": POINTERS[dtype],
                    "ids": "*i64",
                    "order": "*i64",
                    "token_band": "*i32",
                    "token_row": "*i32",
                    "count": count,
                    "dim": dim,
                    "vocabulary": sum(rows),
                    "padding_idx": -2,
                    "first_band": 0,
                    "BANDS": 3,
                    "PROJECTED": sum(1 << b for b, w in enumerate(widths) if w != dim),
                    "ZEROS": True,
                    "SORTED": count * dim * sum(projected) >= forward.SORT_FROM,
                }
                for b in range(forward.BANDS_PER_LAUNCH):
                    n, w = (rows[b], widths[b]) if b < 3 else (rows[0], widths[0])
                    arguments |= {
                        f"table{b}": POINTERS[dtype],
                        f"projection{b}": POINTERS[dtype],
                        f"rows{b}": n,
                        f"width{b}": w,
                        f"table_row{b}": w,
                        f"table_column{b}": 1,
                        f"projection_row{b}": w if w != dim else 1,
                        f"projection_column{b}": 1,
                    }
                for candidate, (block_n, block_d, most_k, warps) in enumerate(configs):
                    if candidate and (name == "D768" or dtype == torch.float16 or count < TOKENS):
                        continue
                    blocks = {"BLOCK_N": block_n, "BLOCK_D": block_d}
                    for b in range(forward.BANDS_PER_LAUNCH):
                        wide = max(16, triton.next_power_of_2(arguments[f"width{b}"]))
                        blocks[f"BLOCK_K{b}"] = min(most_k, wide)
                    yield Case(
                        f"forward {label(dtype)} {name} N{count}{_suffix(candidate)}",
                        forward.embedding_kernel,
                        arguments | blocks,
                        num_warps=warps,
                        candidate=candidate > 0,
                        options={"debug": True, "sanitize_overflow": False},
                    )
    yield Case(
        "row keys",
        forward.row_keys_kernel,
        {"keys": "*i32", "ids": "*i64", "token_band": "*i32", "token_row": "*i32", "count": TOKENS,
         "vocabulary": 50257, "padding_idx": -2, "bands": 3, "stride": 40257, "BLOCK": 512},
    )  # fmt: skip


def _sums_cases():
    for dtype in HALF[:1] + DTYPES[-1:]:
        for width, permuted in ((512, True), (32, False)):
            wide = run_sums.power_of_2(width, 16, 512)
            common = {
                "grad": POINTERS[dtype],
                "partial": "*fp32",
                "keys": "*i32",
                "bounds": "*i64",
                "band": 2,
                "first_key": 80514,
                "rows": 40257,
                "width": width,
                "TILE": run_sums.TILE,
            }
            yield Case(
                f"sum runs {label(dtype)} W{width}",
                run_sums.sum_runs_kernel,
                common
                | {
                    "values": POINTERS[dtype] if permuted else "*fp32",
                    "order": "*i64",
                    "value_row": width,
                    "value_column": 1,
                    "PERMUTED": permuted,
                    "BLOCK_W": wide,
                },
                num_warps=max(1, wide // 64),
            )
            joined = run_sums.power_of_2(width, 16, 128)
            yield Case(
                f"join runs {label(dtype)} W{width}",
                run_sums.join_runs_kernel,
                common | {"BLOCK_T": 32, "BLOCK_W": joined},
                num_warps=max(1, joined // 32),
            )


def _backward_cases():
    for dim, widths in ((512, (128, 32)), (768, (192, 48)), (4096, (1024, 256))):
        for width in widths:
            for dtype in DTYPES if width == 32 else DTYPES[::2] if dim == 512 else HALF[:1]:
                common = {
                    "grad_out": POINTERS[dtype],
                    "order": "*i64",
                    "bounds": "*i64",
                    "band": 2,
                    "dim": dim,
                    "width": width,
                    "grad_row": dim,
                    "grad_column": 1,
                }
                name = f"{label(dtype)} D{dim} W{width}"
                for n, config in enumerate(backward.project_back_configs(dtype, width)):
                    if n and width != 128:
                        break
                    block_n, block_d, block_w, warps = config
                    yield Case(
                        f"project back {name}{_suffix(n)}",
                        backward.project_back_kernel,
                        common
                        | {"back": "*fp32", "projection": POINTERS[dtype], "projection_row": width,
                           "projection_column": 1, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_W": block_w},
                        num_warps=warps,
                        candidate=n > 0,
                    )  # fmt: skip
                for n, config in enumerate(backward.projection_grad_configs(dtype, dim, width)):
                    if n and width != 128:
                        break
                    block_n, block_d, block_w, warps = config
                    yield Case(
                        f"projection grad {name}{_suffix(n)}",
                        backward.projection_grad_kernel,
                        common
                        | {"partial": "*fp32", "keys": "*i32", "table": POINTERS[dtype], "first_key": 80514,
                           "rows": 40257, "table_row": width, "table_column": 1,
                           "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_W": block_w},
                        num_warps=warps,
                        candidate=n > 0,
                    )  # fmt: skip


def cases() -> list[Case]:
    return [*_forward_cases(), *_sums_cases(), *_backward_cases()]
