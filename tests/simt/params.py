"""The structs of csrc/params.h and csrc/cuda/*.h for ctypes, and their values for tensors."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Strides(Structure):
    _fields_ = [(n, c_int64) for n in "bhtd"]


class AttendParams(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("query", "key", "value", "indices", "out", "lse")),
        *((f"{n}_strides", Strides) for n in ("query", "key", "value", "indices")),
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "groups", "query_length", "key_length")),
        *((n, c_int64) for n in ("head_dim", "value_dim", "slots")),
        ("scale", c_float),
        ("dtype", c_int32),
    ]


class KeyLists(Structure):
    _fields_ = [*((n, c_void_p) for n in ("starts", "counts", "queries")), ("blocks", c_int64)]


class AttendGradients(Structure):
    _fields_ = [
        ("forward", AttendParams),
        *((n, c_void_p) for n in ("grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "rows")),
        ("lists", KeyLists),
    ]


def contiguous_rows(tensor: Tensor) -> Tensor:
    """As the host side does: kernels want the last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def attend_params(
    gpu, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scale: float
) -> AttendParams:
    query, key, value, indices = map(contiguous_rows, (query, key, value, indices))
    named = {"query": query, "key": key, "value": value, "indices": indices}
    return AttendParams(
        **{n: gpu.put(t) for n, t in named.items()},
        **{f"{n}_strides": Strides(*t.stride()) for n, t in named.items()},
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        groups=indices.shape[1],
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        slots=indices.shape[3],
        scale=scale,
        dtype=DTYPES[query.dtype],
    )
