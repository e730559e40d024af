"""What the GPUs of the roofline can do, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    processors: int
    clock: float  # GHz
    memory: float  # TB/s
    cache: float  # TB/s, of the second level
    tensor: float  # bf16 operations per clock and multiprocessor
    legacy: float  # the same with mma.sync
    multiply_add: float  # float32 operations per clock and multiprocessor
    shared: int  # KiB of a multiprocessor


GPUS = (
    Gpu("A100", 108, 1.41, 2.0, 4.5, 2048, 2048, 128, 164),
    Gpu("H100", 132, 1.75, 3.35, 5.5, 4096, 2540, 256, 228),
    Gpu("H200", 132, 1.75, 4.8, 5.5, 4096, 2540, 256, 228),
    Gpu("B200", 148, 1.85, 8.0, 9.0, 8192, 1270, 256, 228),
)
# Of a multiprocessor; KiB of shared memory that a block takes besides.
REGISTERS, WARPS, RESERVED = 65536, 64, 1


def resident(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Warps that a multiprocessor holds."""
    by_registers = REGISTERS // (32 * -(-registers // 8) * 8 * warps)
    by_shared = gpu.shared * 1024 // (shared + RESERVED * 1024)
    return min(by_registers, by_shared, WARPS // warps) * warps
