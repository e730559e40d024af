"""The wing of csrc/cuda: NVIDIA GPUs, kernels compiled into `sparse_attn._C`, and why it is absent where it is."""

from __future__ import annotations

import re

import torch

from sparse_attn.rule import EVERYWHERE
from sparse_attn.wings import extension
from sparse_attn.wings.base import Wing, register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MINIMUM = (8, 0)  # compute capability: mma.sync with bfloat16, asynchronous copies
# What a warp holds in registers (kMostDim of csrc/cuda/kernels/gathered_attention.h) and a launch in its parameters
# (kMostBands of csrc/cuda/kernels/variable_width_embedding.h); the size of a sparse gradient would have to come back
# from the GPU. An op that csrc/cuda does not register goes to the next wing.
LIMITS = {
    "head_dim": 256,
    "value_dim": 256,
    "bands": 16,
    "sparse_gradients": 0,
    "rounded_scores": 0,
    "blocks": 0,
}


# By their counts the two selections are near each other (docs/cuda.md); until a device has said which is faster,
# Triton's goes first where it is installed.
BEHIND = {"topk_select": "triton", "topk_attention": "triton"}


def serves(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `arch` ("80", "90a", or PTX: "90-virtual") runs on a GPU of this compute capability."""
    match = re.fullmatch(r"(\d+)(a|-virtual)?", arch)
    assert match is not None  # the build knows no other names
    number, kind = match.groups()
    own = divmod(int(number), 10)
    if kind == "-virtual":
        return capability >= own
    if kind == "a":
        return capability == own
    return capability[0] == own[0] and capability >= own


def _why_not_there(device: torch.device) -> str | None:
    """Of that GPU, where it is known: a graph being compiled says no more than "cuda"."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM:
        return "it needs compute capability {}.{}, got {}.{}".format(*MINIMUM, *capability)
    archs = extension.module.build_info()["cuda_archs"]
    if not any(serves(arch, capability) for arch in archs):
        return "it was built for {}, which a GPU of {}.{} does not run".format(", ".join(archs), *capability)
    return None


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if extension.load_error is not None:
        return extension.load_error
    info = extension.module.build_info()
    if info["cuda"] is None:
        return f"the extension was built without CUDA: {info['no_cuda']}"
    if device.type != "cuda" or torch.version.hip:
        return f"it takes cuda tensors, got {'ROCm ones' if torch.version.hip else device.type}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return _why_not_there(device)


def _way(op: str, sizes: dict[str, int]) -> str | None:
    return "without the key index, which it does not have" if "key_index" in sizes else None


CUDA_WING = Wing(
    "cuda", "CUDA", extension.ops_of("cuda", "CUDA"), _why_not, LIMITS, EVERYWHERE, behind=BEHIND, way=_way
)
register(CUDA_WING)
