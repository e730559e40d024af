"""The CUDA wing on the simulated GPU, called by tests like any other wing."""

from __future__ import annotations

import ctypes
import math

import torch

from simt import device
from simt.device import Device
from simt.params import (
    PROJECTION_PARTS,
    AttendGradients,
    AttendParams,
    KeyLists,
    attend_params,
    embed_params,
    select_call,
)
from sparse_attn.ops.gathered_attention import sink_gradient
from sparse_attn.rule import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, sink_logits, indices, scale, softcap, schedule, atomics, chunk, key_range
    ):
        gpu = Device(schedule)
        p = attend_params(gpu, query, key, value, indices, scale, softcap, sink_logits)
        p.out = gpu.empty((*query.shape[:3], value.shape[3]), query.dtype)
        p.lse = gpu.empty(query.shape[:3], torch.float32)
        gpu.run("run_gathered_attention", ctypes.byref(p))
        out, lse = gpu.get(p.out), gpu.get(p.lse)
        ctx.save_for_backward(query, key, value, sink_logits, indices, out, lse)
        ctx.scoring, ctx.schedule, ctx.atomics = (scale, softcap), schedule, atomics
        ctx.chunk, ctx.key_range = chunk, key_range
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, sink_logits, indices, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        gpu = Device(ctx.schedule)
        p = attend_params(gpu, query, key, value, indices, *ctx.scoring, sink_logits)
        p.out, p.lse = gpu.put(out), gpu.put(lse)
        for name in ("key_list_blocks", "key_list_range", "gradient_chunk", "partial_floats"):
            getattr(gpu.library, f"run_{name}").restype = ctypes.c_int64
        gpu.library.run_gradients_on_tiles.restype = ctypes.c_bool
        tiles = gpu.library.run_gradients_on_tiles(ctypes.byref(p))
        atomics = ctx.atomics and tiles
        chunk = gpu.library.run_gradient_chunk(ctypes.byref(p))
        chunk = min(chunk, ctx.chunk) if tiles and ctx.chunk else chunk
        part = AttendParams.from_buffer_copy(p)
        part.query_length = chunk
        blocks = gpu.library.run_key_list_blocks(ctypes.byref(part))
        range_ = gpu.library.run_key_list_range(ctypes.byref(part), ctypes.c_int64(blocks))
        range_ = min(range_, ctx.key_range or range_)
        lists = 0 if atomics else p.batch * p.groups
        partials = gpu.library.run_partial_floats(ctypes.byref(p), ctypes.c_int64(chunk))
        sums = (p.batch, p.kv_heads, p.key_length, p.head_dim + p.value_dim)
        g = AttendGradients(
            forward=p,
            grad_out=gpu.put(grad_out.contiguous()),
            grad_lse=gpu.put(None if grad_lse is None else grad_lse.contiguous()),
            grad_query=gpu.empty(query.shape, query.dtype),
            grad_key=gpu.empty(key.shape, key.dtype),
            grad_value=gpu.empty(value.shape, value.dtype),
            rows=None if tiles else gpu.empty((*query.shape[:3], 4), torch.float32),
            lists=KeyLists(
                starts=gpu.empty((lists, p.key_length + 1), torch.int64),
                counts=gpu.empty((lists, blocks, range_), torch.int64),
                queries=gpu.empty((lists, chunk * p.slots), torch.int32),
                blocks=blocks,
                range=range_,
            ),
            chunk=chunk,
            partials=gpu.empty((partials,), torch.float32) if tiles and not atomics else None,
            sums=gpu.empty(sums, torch.float32) if atomics or chunk < p.query_length else None,
            atomics=atomics,
        )
        gpu.run("run_gathered_attention_backward", ctypes.byref(g))
        of_sinks = None
        if ctx.needs_input_grad[3]:
            of_sinks = sink_gradient(sink_logits, out, lse, grad_out, grad_lse)
        return *(gpu.get(t) for t in (g.grad_query, g.grad_key, g.grad_value)), of_sinks, *(None,) * 7


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, token_band, token_row, padding_idx, schedule, bands, *leaves):
        tables, projections = leaves[:bands], leaves[bands:]
        gpu = Device(schedule)
        p = embed_params(gpu, ids, tables, projections, token_band, token_row, padding_idx)
        p.out = gpu.empty((ids.numel(), p.embedding_dim), tables[0].dtype)
        gpu.run("run_variable_width_embedding", ctypes.byref(p))
        ctx.arguments = ids, tables, projections, token_band, token_row, padding_idx
        ctx.schedule = schedule
        return gpu.get(p.out)

    @staticmethod
    def backward(ctx, grad_out):
        gpu = Device(ctx.schedule)
        p = embed_params(gpu, *ctx.arguments)
        _, tables, projections, *_ = ctx.arguments
        p.grad_out = gpu.put(grad_out.contiguous())
        keys = gpu.empty((p.count,), torch.int32)
        gpu.run("run_embedding_keys", ctypes.byref(p), ctypes.c_void_p(keys))
        ascending, order = torch.sort(gpu.get(keys), stable=True)
        p.keys, p.order = gpu.put(ascending), gpu.put(order)
        dtype, dim = tables[0].dtype, p.embedding_dim
        for band, table, projection in zip(p.bands, tables, projections, strict=False):
            band.grad_table = gpu.empty(table.shape, dtype)
            if projection is not None:
                band.back = gpu.empty((p.count, table.shape[1]), torch.float32)
                band.grad_projection = gpu.empty(projection.shape, dtype)
                band.parts = gpu.empty((PROJECTION_PARTS, dim, table.shape[1]), torch.float32)
        gpu.run("run_variable_width_embedding_backward", ctypes.byref(p))
        used = p.bands[: len(tables)]
        grads = [gpu.get(b.grad_table) for b in used]
        grads += [gpu.get(b.grad_projection) if b.grad_projection else None for b in used]
        return (None,) * 6 + tuple(grads)


class SimulatedWing:
    """Stands where a WingUnderTest does, for the ops that csrc/cuda has."""

    name, missing = "cuda", device.why_not()

    def __init__(
        self,
        schedule: int = 0,
        dtypes: tuple[torch.dtype, ...] = DTYPES,
        *,
        atomics: bool = False,  # of gathered_attention's backward
        chunk: int | None = None,  # queries that it works on at a time; None is what the kernels choose
        key_range: int | None = None,  # keys that it counts at a time; likewise
    ) -> None:
        self.schedule, self.dtypes, self.atomics = schedule, dtypes, atomics
        self.chunk, self.key_range = chunk, key_range

    def __str__(self) -> str:
        return f"cuda-simulated-{self.schedule}"

    def topk_select(
        self, query, key, top_k, *, is_causal=False, causal_offset=None, attn_mask=None, key_lengths=None, scale=None,
        window=0, sinks=0, share="none", key_starts=None, softcap=None, sink_logits=None,
    ):  # fmt: skip
        query, key = query.detach(), key.detach()
        sink_logits = None if sink_logits is None else sink_logits.detach()
        kept, scoring = (window, sinks, share), (scale, softcap, sink_logits)
        rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, *kept, *scoring, key_starts)
        packed = rule.packed(query, key, top_k)
        gpu = Device(self.schedule)
        call = select_call(gpu, query, key, top_k, *packed.parts())
        p = call.select
        p.indices = gpu.empty((p.batch, packed.groups, p.query_length, p.top_k), torch.int32)
        gpu.run("run_topk_select", ctypes.byref(call))
        return gpu.get(p.indices)

    def topk_attention(self, query, key, value, top_k, *, return_lse=False, return_indices=False, **options):
        indices = self.topk_select(query, key, top_k, **options)
        scoring = {name: options.get(name) for name in ("scale", "softcap", "sink_logits")}
        results = self.gathered_attention(query, key, value, indices, return_lse=True, **scoring)
        results = (results[0], *results[1:][:return_lse], *[indices][:return_indices])
        return results if len(results) > 1 else results[0]

    def gathered_attention(
        self, query, key, value, indices, *, scale=None, return_lse=False, softcap=None, sink_logits=None
    ):
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        indices = (indices.unsqueeze(1) if indices.dim() == 3 else indices).to(torch.int32)
        out, lse = _Attention.apply(
            query,
            key,
            value,
            sink_logits,
            indices,
            scale,
            softcap or 0.0,
            self.schedule,
            self.atomics,
            self.chunk,
            self.key_range,
        )
        return (out, lse) if return_lse else out

    def variable_width_embedding(self, ids, tables, projections, token_band, token_row, *, padding_idx=None):
        padding_idx = -1 if padding_idx is None else padding_idx % token_band.numel()
        flat = ids.reshape(-1).contiguous()
        arguments = flat, token_band, token_row, padding_idx, self.schedule, len(tables)
        out = _Embedding.apply(*arguments, *tables, *projections)
        return out.view(*ids.shape, out.shape[1])
