"""The instruction sets that the CPU kernels are compiled for.

Every csrc/cpu/kernels/*.cpp is compiled once per row, with -DSPARSE_ATTN_ISA=<name>; the CPU at run time decides which
copy is called (csrc/cpu/isa.cpp asks it). Rising order; a row whose flags the compiler does not know is left out.
"""

from __future__ import annotations

import platform

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86 = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],  # a CPU that has the first has the second
    "amx": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
}
# 64-bit ARM: what all of them have, products of bytes, and products of bfloat16 and of matrices of bytes.
ARM = {
    "neon": [],
    "neon_dot": ["-march=armv8.2-a+dotprod"],
    "neon_bf16": ["-march=armv8.2-a+dotprod+bf16+i8mm"],  # a CPU that has one of the last two has both
}
# Of these rows only what such products are in; a CPU that has them takes the rest from the rows above.
_LOSS = ("variable_width_cross_entropy", "variable_width_cross_entropy_backward")
_SCORES = (
    "block_tail",
    "indexer_select",
    "topk_bounds",
    "topk_decode",
    "topk_select",
)  # they share packed keys
PARTS = {
    "amx": ("topk_bounds", *_LOSS),
    "neon_dot": _SCORES,
    "neon_bf16": (*_SCORES, *_LOSS),
}


def of_this_machine() -> dict[str, list[str]]:
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ARM
    return X86 if machine in ("x86_64", "amd64") else {"generic": []}
