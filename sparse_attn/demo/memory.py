"""The peak memory of a piece of a program."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

import torch


class PeakMemory:
    """The most memory in use since this object was made, above what was in use then.

    On CUDA that of PyTorch's allocator. On the CPU that of the whole process, from Linux's own high-water mark,
    which can be set back; elsewhere `peak` is None.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._cuda = device if device.type == "cuda" else None
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        else:
            self._before = _reset_high_water() if device.type == "cpu" else None

    def peak(self) -> int | None:
        """Bytes, or None where it cannot be known."""
        if self._before is None:
            return None
        most = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else _high_water()
        return max(most - self._before, 0)


def _high_water() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def _reset_high_water() -> int | None:
    """Sets the high-water mark back to what is resident now, and returns that."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        # Memory that was freed but not given back would hide what the next one takes.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water()
    except (OSError, AttributeError):
        return None  # not Linux, or a sandbox that forbids it
