"""The wing of `sparse_attn.triton_kernels`: NVIDIA, AMD and Intel GPUs, and the CPU in Triton's interpreter.

Triton takes a second to load and is not everywhere, so each op imports its kernels on its first call. Kernels read
TRITON_INTERPRET when they are defined, hence it is read once, when the package is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from sparse_attn.rule import EVERYWHERE, OFFSETS
from sparse_attn.wings.base import Wing, register

PACKAGE = "sparse_attn.triton_kernels"
MINIMUM = (3, 2)  # of Triton
DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs "cuda" too
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sizes a kernel holds in registers at once. `explain` and the dispatcher read them; the ops name the sizes.
LIMITS = {"head_dim": 256, "value_dim": 256}

# Its distributions, by platform.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")


def _version() -> tuple[int, ...] | None:
    """Triton's, (0,) where it is there without saying, None where it is not there."""
    if find_spec("triton") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return tuple(int(n) for n in metadata.version(name).split(".")[:2])
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return (0,)


version = _version()
interpreted = os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes")


def _too_old(device: torch.device) -> str | None:
    """The device, where it is known: a graph being compiled says no more than "cuda"."""
    if device.type != "cuda" or torch.version.hip or interpreted or torch.compiler.is_compiling():
        return None
    if not torch.cuda.is_available():
        return None  # a fake tensor
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else "it needs compute capability 8.0, got {}.{}".format(*capability)


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if version is None:
        return "Triton is not installed (pip install triton)"
    if (0,) < version < MINIMUM:
        return "it needs Triton {}.{}, got {}.{}".format(*MINIMUM, *version)
    if device.type == "cpu" and not interpreted:
        return (
            "it takes cpu tensors only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )
    if device.type not in (*DEVICES, "cpu"):
        return f"it takes {' and '.join(DEVICES)} tensors, got {device.type}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return _too_old(device)


def _way(op: str, sizes: dict[str, int]) -> str | None:
    """As topk_select.py, indexed_select.py and paged_select.py have it."""
    if "key_index" not in sizes:
        return None
    if op.startswith("paged"):
        return "without the key index, which it does not read in pages"
    return "what the key index cannot rule out is scored, and what it does not prove is selected without it"


def _folder() -> Path | None:
    """Where the kernels are: inside the package, or in a checkout (PYTHONPATH, editable) beside it.

    `triton_kernels` as a top-level name is another project's, so an install puts the folder inside.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "triton_kernels", package.parent / "triton_kernels"):
        if (folder / "__init__.py").is_file():
            return folder
    return None


def _import_from(folder: Path) -> None:
    """Makes `sparse_attn.triton_kernels` of a folder that is not inside the package."""
    if folder.parent == Path(__file__).resolve().parents[1] or PACKAGE in sys.modules:
        return
    spec = spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None  # it is a Python file that exists,
    assert spec.loader is not None  # and Python has a loader for those
    sys.modules[PACKAGE] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[PACKAGE])
    except BaseException:
        del sys.modules[PACKAGE]  # or the next import would find it half made
        raise


def _on_first_call(op: str) -> Callable:
    function = None

    def implementation(*arguments):
        nonlocal function
        if function is None:
            function = getattr(import_module(f"{PACKAGE}.{op}"), op)
        device = arguments[0].device  # the first argument of every op is a tensor
        if device.type == "cpu":
            return function(*arguments)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.get_device_module(device).device(device):
            return function(*arguments)

    return implementation


_kernels = _folder()
# Each file is an op, and has a function of its name.
OPS = () if _kernels is None else tuple(sorted(f.stem for f in _kernels.glob("[!_]*.py")))
if _kernels is not None:
    _import_from(_kernels)
TRITON_WING = Wing(
    name="triton",
    # Not a key per device: one kernel serves CUDA, ROCm, XPU and, interpreted, the CPU.
    dispatch_key="CompositeExplicitAutograd",
    implementations={op: _on_first_call(op) for op in OPS},
    why_not=_why_not,
    limits=LIMITS,
    rule=EVERYWHERE | {OFFSETS},
    way=_way,
    # The interpreter is thousands of times slower than any other wing: nobody gets it without a word.
    by_name_only=interpreted,
)
register(TRITON_WING)
