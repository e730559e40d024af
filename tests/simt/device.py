"""Builds the simulated device with the kernels of csrc/cuda, and moves tensors onto it and back."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from simt.params import check_sizes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
SCHEDULES = (0, 1, 7)  # threads in order, the last one first, at random and interrupted at random accesses


def why_not() -> str | None:
    """None where the simulated device can be built, else why not."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "the simulated GPU switches threads on Linux and x86-64 only"
    if not (CSRC / "cuda").is_dir():
        return "no source checkout"
    if shutil.which("g++") is None:
        return "the simulated GPU is built with g++"
    return None


@cache
def library() -> ctypes.CDLL:
    """The shared library; rebuilt when a source changed, and kept under build/."""
    sources = [
        HERE / "runtime.cpp",
        HERE / "faulty.cu",
        HERE / "entry.cpp",
        *sorted((CSRC / "cuda/kernels").glob("*.cu")),
    ]
    sources = [s for s in sources if s.exists()]
    inputs = [
        *sources,
        HERE / "simt.h",
        Path(__file__),
        *CSRC.glob("common/*.h"),
        *CSRC.glob("cuda/kernels/**/*.*h"),
    ]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(inputs))).hexdigest()[:16]
    target = ROOT / "build" / "simt" / f"{digest}.so"
    if not target.exists():
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir(parents=True)
        objects = [target.with_name(f"{s.name}.{os.getpid()}.o") for s in sources]
        common = [
            "g++",
            "-std=c++17",
            "-O2",
            "-g1",
            "-fPIC",
            "-Wall",
            "-Wno-unknown-pragmas",
            f"-I{HERE}",
            f"-I{CSRC}",
        ]
        running = [
            # The hooks of -fsanitize=thread are runtime.cpp's own; the sanitizer itself is not linked.
            subprocess.Popen(
                [
                    *common,
                    *(["-fsanitize=thread"] if s.suffix == ".cu" else []),
                    "-x",
                    "c++",
                    "-c",
                    s,
                    "-o",
                    o,
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            for s, o in zip(sources, objects, strict=True)
        ]
        for process in running:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors
        fresh = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *objects, "-o", fresh], check=True)
        fresh.replace(target)
    loaded = ctypes.CDLL(str(target))
    check_sizes(loaded)
    loaded.simt_allocate.restype = ctypes.c_void_p
    loaded.simt_allocate.argtypes = [ctypes.c_size_t]
    loaded.simt_upload.argtypes = loaded.simt_download.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]
    loaded.simt_download.restype = ctypes.c_bool
    loaded.simt_error.restype = ctypes.c_char_p
    return loaded


class Device:
    """The simulated GPU, empty. Tensors keep their strides; what is not written is found when it is fetched.

    Example:
        >>> gpu = Device()
        >>> gpu.run("run_faulty", gpu.put(torch.zeros(64, dtype=torch.int32)), gpu.empty((64,), torch.int32), 1, 64, 14)
    """

    def __init__(self, schedule: int = 0) -> None:
        self.library = library()
        self.library.simt_reset()
        self.library.simt_schedule(schedule)
        self._made: dict[int, torch.Tensor] = {}

    def _allocate(self, size: int) -> int:
        pointer = self.library.simt_allocate(max(size, 2))
        assert pointer, "the simulated GPU has no more memory"
        return pointer

    def put(self, tensor: torch.Tensor | None) -> int | None:
        """The address of the tensor's first element on the device, its whole storage around it."""
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        pointer = self._allocate(storage.nbytes())
        if storage.nbytes():
            self.library.simt_upload(pointer, storage.data_ptr(), storage.nbytes())
        return pointer + tensor.storage_offset() * tensor.element_size()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The address of a tensor that a kernel is to write; `get` fetches it."""
        made = torch.empty(shape, dtype=dtype)
        pointer = self._allocate(made.nbytes)
        self._made[pointer] = made
        return pointer

    def get(self, pointer: int) -> torch.Tensor:
        made = self._made[pointer]
        if made.numel():
            whole = self.library.simt_download(made.data_ptr(), pointer, made.nbytes)
            assert whole, "the kernels left a part of their result unwritten"
        return made

    def run(self, function: str, *arguments) -> None:
        """Calls a host function that returns an error text or null; the text becomes a RuntimeError."""
        call = getattr(self.library, function)
        call.restype = ctypes.c_char_p
        error = call(*(ctypes.c_void_p(a) if isinstance(a, int) and a > 2**31 else a for a in arguments))
        error = error or self.library.simt_error()
        if error:
            raise RuntimeError(error.decode())
