"""The kernels of variable_width_embedding as it launches them."""

from __future__ import annotations

import torch
import triton

from sparse_attn.triton_kernels import variable_width_embedding as forward
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


def _forward_cases():
    for name, (dim, rows, widths) in MODELS.items():
        for dtype in DTYPES if name == "D512" else HALF[:1]:
            for count in (TOKENS, 16) if dtype == HALF[0] else (TOKENS,):
                projected = [w for w in widths if w != dim]
                block_n, block_d, most_k, warps = forward.forward_config(dtype, count, dim, max(projected))
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
                    "BLOCK_N": block_n,
                    "BLOCK_D": block_d,
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
                        f"BLOCK_K{b}": min(most_k, max(16, triton.next_power_of_2(w))),
                    }
                yield Case(
                    f"forward {label(dtype)} {name} N{count}",
                    forward.embedding_kernel,
                    arguments,
                    num_warps=warps,
                    options={"debug": True, "sanitize_overflow": False},
                )
    yield Case(
        "row keys",
        forward.row_keys_kernel,
        {"keys": "*i32", "ids": "*i64", "token_band": "*i32", "token_row": "*i32", "count": TOKENS,
         "vocabulary": 50257, "padding_idx": -2, "bands": 3, "stride": 40257, "BLOCK": 512},
    )  # fmt: skip


def cases() -> list[Case]:
    return list(_forward_cases())
