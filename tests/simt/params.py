"""The structs of csrc/common and csrc/cuda/kernels/*.h for ctypes, and their values for tensors."""

from __future__ import annotations

from ctypes import Structure, byref, c_bool, c_float, c_int32, c_int64, c_void_p, sizeof

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
        *((n, c_float) for n in ("scale", "softcap")),
        ("sink_logits", c_void_p),
        ("dtype", c_int32),
    ]


class KeyLists(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("starts", "counts", "queries")),
        *((n, c_int64) for n in ("blocks", "range")),
    ]


class AttendGradients(Structure):
    _fields_ = [
        ("forward", AttendParams),
        *((n, c_void_p) for n in ("grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "rows")),
        ("lists", KeyLists),
        ("chunk", c_int64),
        *((n, c_void_p) for n in ("partials", "sums")),
        ("atomics", c_bool),
    ]


def contiguous_rows(tensor: Tensor) -> Tensor:
    """As the host side does: kernels want the last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def attend_params(
    gpu,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
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
        softcap=softcap,
        sink_logits=gpu.put(sink_logits),
        dtype=DTYPES[query.dtype],
    )


class PerQuery(Structure):
    _fields_ = [*((n, c_void_p) for n in ("narrow", "wide")), *((n, c_int64) for n in ("b", "t"))]


class Rule(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("mask", "lengths")),
        ("mask_strides", Strides),
        *((n, PerQuery) for n in ("starts", "offsets")),
        *((n, c_int64) for n in ("causal_offset", "window", "sinks", "groups")),
        *((n, c_float) for n in ("scale", "softcap")),
        ("sink_logits", c_void_p),
        ("is_causal", c_bool),
    ]


class SelectParams(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("query", "key", "indices")),
        *((f"{n}_strides", Strides) for n in ("query", "key")),
        ("rule", Rule),
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "query_length", "key_length")),
        *((n, c_int64) for n in ("head_dim", "top_k")),
        ("bounds_bits", c_int32),
        ("rounded", c_bool),
        ("dtype", c_int32),
        ("blocks", c_void_p),
        ("blocks_strides", Strides),
        *((n, c_int64) for n in ("block_slots", "block_size", "query_tile")),
    ]


class SelectPlan(Structure):
    _fields_ = [
        *((n, c_int64) for n in ("blocks", "capacity", "packed", "splits", "split_keys")),
        *((n, c_int64) for n in ("stride", "sample_budget")),
        *((f"{n}_bytes", c_int64) for n in ("candidate", "part", "lse", "lse_part")),
    ]


class SelectCall(Structure):
    _fields_ = [
        ("select", SelectParams),
        ("plan", SelectPlan),
        *((n, c_void_p) for n in ("narrow_lengths", "lse", "lse_parts", "candidates", "parts")),
    ]


def select_call(
    gpu, query, key, top_k, mask, lengths, starts, offsets, rule, scale, softcap, sink_logits
) -> SelectCall:
    """Arguments as the schema of topk_select has them; `rule` is [is_causal, causal_offset, window, sinks, groups]."""
    assert offsets is None, "the kernels have no offsets of queries"
    is_causal, causal_offset, window, sinks, groups = rule
    query, key = contiguous_rows(query), contiguous_rows(key)
    p = SelectParams(
        query=gpu.put(query),
        key=gpu.put(key),
        query_strides=Strides(*query.stride()),
        key_strides=Strides(*key.stride()),
        rule=Rule(
            mask=gpu.put(mask),
            mask_strides=Strides(*(mask.stride() if mask is not None else (0,) * 4)),
            causal_offset=causal_offset,
            window=min(window, 1 << 40),
            sinks=min(sinks, 1 << 40),
            groups=groups,
            scale=scale,
            softcap=softcap,
            sink_logits=gpu.put(sink_logits),
            is_causal=is_causal,
        ),
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=query.shape[3],
        top_k=min(top_k, key.shape[2]),
        dtype=DTYPES[query.dtype],
    )
    call = SelectCall(select=p)
    if lengths is not None and lengths.dtype == torch.int32:
        call.narrow_lengths = gpu.put(lengths.contiguous())
    elif lengths is not None:
        call.select.rule.lengths = gpu.put(lengths.contiguous())
    if starts is not None:
        width = "narrow" if starts.dtype == torch.int32 else "wide"
        call.select.rule.starts = PerQuery(**{width: gpu.put(starts)}, b=starts.stride(0), t=starts.stride(1))
    gpu.library.run_select_plan(byref(call))
    for scratch in ("candidates", "parts", "lse", "lse_parts"):
        size = getattr(call.plan, f"{scratch.removesuffix('s')}_bytes")
        setattr(call, scratch, gpu.empty((size,), torch.uint8))
    return call


MOST_BANDS, PROJECTION_PARTS = 16, 16


class EmbedBand(Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("table", "projection")),
        *((n, c_int64) for n in ("rows", "stride", "width", "first")),
        *((n, c_void_p) for n in ("grad_table", "grad_projection", "back", "parts")),
    ]


class EmbedParams(Structure):
    _fields_ = [
        ("bands", EmbedBand * MOST_BANDS),
        *((n, c_void_p) for n in ("ids", "token_band", "token_row")),
        *((n, c_bool) for n in ("wide_ids", "wide_rows")),
        *((n, c_int64) for n in ("count", "vocabulary", "padding_idx", "embedding_dim", "all_rows")),
        *((n, c_int32) for n in ("band_count", "dtype")),
        *((n, c_void_p) for n in ("out", "grad_out", "keys", "order")),
    ]


def embed_params(gpu, ids, tables, projections, token_band, token_row, padding_idx: int) -> EmbedParams:
    """ids flat; projections[b] None where there is none."""
    p = EmbedParams(
        ids=gpu.put(ids),
        token_band=gpu.put(token_band.contiguous()),
        token_row=gpu.put(token_row.contiguous()),
        wide_ids=ids.dtype == torch.int64,
        wide_rows=token_row.dtype == torch.int64,
        count=ids.numel(),
        vocabulary=token_band.numel(),
        padding_idx=padding_idx,
        embedding_dim=next((q.shape[0] for q in projections if q is not None), tables[0].shape[1]),
        band_count=len(tables),
        dtype=DTYPES[tables[0].dtype],
    )
    for band, (table, projection) in enumerate(zip(map(contiguous_rows, tables), projections, strict=True)):
        p.bands[band] = EmbedBand(
            table=gpu.put(table),
            projection=gpu.put(None if projection is None else projection.contiguous()),
            rows=table.shape[0],
            stride=table.stride(0),
            width=table.shape[1],
            first=p.all_rows,
        )
        p.all_rows += table.shape[0]
    return p


def check_sizes(library) -> None:
    """A struct that changed in C++ and not here would be read beyond its end."""
    for name, mirror in (
        ("attend_gradients", AttendGradients),
        ("select_call", SelectCall),
        ("embed_params", EmbedParams),
    ):
        size = getattr(library, f"bytes_of_{name}")
        size.restype = c_int64
        assert size() == sizeof(mirror), f"{mirror.__name__} of tests/simt/params.py is not that of csrc"
