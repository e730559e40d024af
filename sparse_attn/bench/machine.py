"""What the figures were measured on: enough to compare, nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

import torch

import sparse_attn
from sparse_attn.bench import inputs
from sparse_attn.wings import extension

# The instruction sets that decide which kernel runs.
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16"),
)


def describe(threads: int, command: str) -> dict:
    """The machine, the software and the command, for the JSON and the PNG."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "cpu_family_model": "/".join(filter(None, (_field(cpuinfo, "cpu family"), _field(cpuinfo, "model")))),
        "cpu_flags": [flag for flag in FLAGS if flag in have],
        "cores": inputs.cores(),
        "threads": threads,
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sparse_attn": sparse_attn.__version__,
        "wing": wing(),
        "extension": extension.module.build_info() if extension.module else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def wing() -> str:
    """The wing that runs float32 topk_attention on the CPU here."""
    query = torch.zeros(1, 1, 1, 1)
    return sparse_attn.explain(query, query, query, 1).backend


def in_words(machine: dict) -> str:
    """One line: the CPU, the threads, the versions, the day."""
    flags = [
        f
        for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimddp")
        if f in machine["cpu_flags"]
    ][:2]
    return (
        f"{machine['cpu']} ({', '.join(flags) or machine['system']}), {_threads(machine['threads'])}, "
        f"torch {machine['torch']}, sparse_attn {machine['sparse_attn']} ({machine['wing']} wing), "
        f"{machine['date']}"
    )


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def available_bytes() -> int:
    """What may still be allocated; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError):
        return _memory_bytes() // 2
