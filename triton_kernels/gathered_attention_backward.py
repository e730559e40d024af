"""`gathered_attention`, backward: queries in their own order for dQ, keys in theirs for dK and dV.

With P the probabilities and δ = Σ dO ∘ O − dLSE of a row: dS = P ∘ (dO·Vᵀ − δ), dQ = s·dS·K, dK = s·dSᵀ·Q,
dV = Pᵀ·dO; with a soft cap, whose tanh is t, dS has the factor 1 − t². Two queries may share a key, so dK and dV are
sums over lists "key → entries (query, slot)" (lib/key_lists.py). Entries of one key are in query order, so each sum
has one order and the result never differs. Bytes decide how a sum is fed:

- Heads that share selection and key head (`_tile_queries`): the kernel that makes dQ has each key's dS and P of all
  heads in one tile, so it also writes each entry's dK and dV, summed over the heads, and `sum_entries` adds the
  entries of each key. An entry costs its D + Dv elements written and read once, whatever the number of heads;
  fetching the queries for each key would cost as much again per head.
- A head alone (`_vector_queries`): an entry's dK is one number times the query. `sum_queries` fetches the queries
  of each key, computes those numbers again and adds.

Both work on chunks of queries, which bounds the scratch memory and the longest list: a key that every query attends
to is one program's work for a chunk at most.

Floor at T = 32k, K = 512, D = Dv = 128, bf16, 16 heads in one unit: 8.6 GB gathered from the second-level cache, 8.6 GB
of entries written and read once, so 6 ms at 3 TB/s; the lists are a few hundredths of those bytes.

SPARSE_ATTN_ATOMICS=1 in the environment lets each query add to dK and dV with atomics instead, in no
fixed order; torch.use_deterministic_algorithms(True) wins over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lib.common import LOG2_OF_E, LOG2E, grid_of, is_half, outer_program, rounded
from .lib.dot import dot
from .lib.gathered_attention_sums import sum_configs, sum_entries, sum_queries
from .lib.key_lists import key_lists
from .lib.rows import gather_rows, load_rows, multiply_rows, vector_configs
from .lib.soft_cap import factors
from .lib.softmax import base_of, gradient_step
from .lib.tuning import run_tuned, size_class

SCRATCH_BYTES = 1 << 29  # of entries' gradients
LISTED_ENTRIES = 1 << 24  # of one chunk: 64 MiB


@triton.jit(do_not_specialize=["programs", "first_query", "query_length", "key_length"])
def _tile_queries(
    grad_out,  # [B, Hq, Tq, Dv]
    grad_lse,  # float32 [B, Hq, Tq], contiguous, or None
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    value,  # [B, Hkv, Tk, Dv]
    indices,  # int32 [B, G, Tq, K]
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    grad_query,  # [B, Hq, Tq, D], contiguous
    key_sink,  # entries' dK [B, Hkv, tiles, chunk, K, D], or with atomics float32 dK [B, Hkv, Tk, D]
    value_sink,  # likewise with Dv
    grad_b, grad_h, grad_t, grad_d,
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    indices_b, indices_g, indices_t, indices_k,
    programs,  # B · Hkv · tiles
    tiles,  # of BLOCK_M heads in a unit
    shared,  # heads in a unit; a unit is a key head
    kv_heads,
    groups,
    first_query,  # of this chunk
    query_length,
    key_length,
    budget,
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    scale,
    ATOMICS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query, up to BLOCK_M heads of one unit: dQ, and what each of its keys and values gets."""
    program = outer_program()
    if program >= programs:
        return
    local = tl.program_id(0).to(tl.int64)
    t = first_query + local
    tile = program % tiles
    unit = program // tiles % kv_heads
    b = (program // tiles // kv_heads).to(tl.int64)
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (unit * shared + member).to(tl.int64)
    present = member < shared
    rows_of = indices + b * indices_b + (unit * groups // kv_heads).to(tl.int64) * indices_g + t * indices_t
    key += b * key_b + unit.to(tl.int64) * key_h
    value += b * value_b + unit.to(tl.int64) * value_h
    queries = load_rows(query + b * query_b + t * query_t, head, present, query_h, query_d, DIM, BLOCK_DIM)
    grads = load_rows(
        grad_out + b * grad_b + t * grad_t, head, present, grad_h, grad_d, VALUE_DIM, BLOCK_VALUE
    )
    row_place = (b * kv_heads * shared + head) * query_length + t
    outs = load_rows(out, row_place, present, VALUE_DIM, 1, VALUE_DIM, BLOCK_VALUE)
    delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row_place, mask=present, other=0.0)
    base = base_of(tl.load(lse + row_place, mask=present, other=float("-inf")))

    key_column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    if ATOMICS:
        key_sink += (b * kv_heads + unit) * key_length * DIM
        value_sink += (b * kv_heads + unit) * key_length * VALUE_DIM
    else:
        entry = (program.to(tl.int64) * tl.num_programs(0) + local) * budget
        key_sink += entry * DIM
        value_sink += entry * VALUE_DIM
    gradient = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    for start in range(0, budget, BLOCK_K):
        row, filled = gather_rows(rows_of, start, indices_k, budget, key_length, BLOCK_K)
        keys, scores = multiply_rows(
            queries, key, row, filled, key_t, key_d, DIM, BLOCK_DIM, BLOCK_M, BLOCK_K
        )
        values, slopes = multiply_rows(
            grads, value, row, filled, value_t, value_d, VALUE_DIM, BLOCK_VALUE, BLOCK_M, BLOCK_K
        )
        scores *= factor
        real = filled[None, :] & present[:, None]  # 0 · inf of a head that is not there is NaN too
        weights, slopes = gradient_step(scores, slopes, 0.0, real, base[:, None], delta[:, None], bound)
        slopes, weights = rounded(slopes, keys.dtype), rounded(weights, values.dtype)
        gradient = dot(slopes, keys, gradient)
        to_key = dot(tl.trans(slopes), queries, tl.zeros((BLOCK_K, BLOCK_DIM), tl.float32)) * scale
        to_value = dot(tl.trans(weights), grads, tl.zeros((BLOCK_K, BLOCK_VALUE), tl.float32))
        key_mask = filled[:, None] & (key_column < DIM)[None, :]
        value_mask = filled[:, None] & (value_column < VALUE_DIM)[None, :]
        if ATOMICS:
            place = row
        else:
            place = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        key_place = key_sink + place[:, None] * DIM + key_column[None, :]
        value_place = value_sink + place[:, None] * VALUE_DIM + value_column[None, :]
        if ATOMICS:
            tl.atomic_add(key_place, to_key, mask=key_mask, sem="relaxed")
            tl.atomic_add(value_place, to_value, mask=value_mask, sem="relaxed")
        else:
            tl.store(key_place, rounded(to_key, key_sink.dtype.element_ty), mask=key_mask)
            tl.store(value_place, rounded(to_value, value_sink.dtype.element_ty), mask=value_mask)

    tl.store(
        grad_query + row_place[:, None] * DIM + key_column[None, :],
        rounded(gradient * scale, grad_query.dtype.element_ty),
        mask=present[:, None] & (key_column < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["programs", "key_length", "rows_half"])
def _vector_queries(
    grad_out,  # [B, Hq, Tq, Dv]
    grad_lse,  # float32 [B, Hq, Tq], contiguous, or None
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    value,  # [B, Hkv, Tk, Dv]
    indices,  # int32 [B, G, Tq, K]
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    sink_logits,  # float32 [Hq], contiguous, or None
    grad_query,  # [B, Hq, Tq, D], contiguous
    rows,  # float32 [2, B, Hq, Tq]: δ, and 1 over the sum of the row's exp(score − LSE)
    grad_key,  # with atomics float32 dK [B, Hkv, Tk, D]
    grad_value,  # with atomics float32 dV [B, Hkv, Tk, Dv]
    grad_b, grad_h, grad_t, grad_d,
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    indices_b, indices_g, indices_t, indices_k,
    programs,  # B · Hq
    heads,
    kv_heads,
    groups,
    key_length,
    budget,
    rows_half,  # B · Hq · Tq
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    scale,
    ATOMICS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query of one head: dQ, and the two numbers of its row that `sum_queries` needs.

    The rounding of a large LSE would be a factor on the whole row: the sum of exp(score − LSE), with the sink's 1 but
    for that rounding, takes it out again.
    """
    program = outer_program()
    if program >= programs:
        return
    t = tl.program_id(0).to(tl.int64)
    head = program % heads
    b = (program // heads).to(tl.int64)
    kv_head = (head * kv_heads // heads).to(tl.int64)
    rows_of = indices + b * indices_b + (head * groups // heads).to(tl.int64) * indices_g + t * indices_t
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    place = (b * heads + head) * tl.num_programs(0) + t
    column, value_column = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    query += b * query_b + head.to(tl.int64) * query_h + t * query_t
    grad_out += b * grad_b + head.to(tl.int64) * grad_h + t * grad_t
    vector = tl.load(query + column.to(tl.int64) * query_d, mask=column < DIM, other=0.0).to(tl.float32)
    grad = tl.load(
        grad_out + value_column.to(tl.int64) * grad_d, mask=value_column < VALUE_DIM, other=0.0
    ).to(tl.float32)
    attended = tl.load(out + place * VALUE_DIM + value_column, mask=value_column < VALUE_DIM, other=0.0)
    delta = tl.sum(grad * attended.to(tl.float32), axis=0)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + place)
    base = base_of(tl.load(lse + place))

    total = tl.zeros((BLOCK_K,), tl.float32)
    gradient = tl.zeros((BLOCK_K, BLOCK_DIM), tl.float32)
    for start in range(0, budget, BLOCK_K):
        row, filled = gather_rows(rows_of, start, indices_k, budget, key_length, BLOCK_K)
        keys = load_rows(key, row, filled, key_t, key_d, DIM, BLOCK_DIM).to(tl.float32)
        values = load_rows(value, row, filled, value_t, value_d, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
        scores = tl.sum(keys * vector[None, :], axis=1) * factor
        of_values = tl.sum(values * grad[None, :], axis=1)
        weights, slopes = gradient_step(scores, of_values, 0.0, filled, base, delta, bound)
        gradient += slopes[:, None] * keys
        total += weights
        if ATOMICS:
            base_row = (b * kv_heads + kv_head) * key_length + row
            tl.atomic_add(
                grad_key + base_row[:, None] * DIM + column[None, :],
                (slopes * scale)[:, None] * vector[None, :],
                mask=filled[:, None] & (column < DIM)[None, :],
                sem="relaxed",
            )
            tl.atomic_add(
                grad_value + base_row[:, None] * VALUE_DIM + value_column[None, :],
                weights[:, None] * grad[None, :],
                mask=filled[:, None] & (value_column < VALUE_DIM)[None, :],
                sem="relaxed",
            )

    whole = tl.sum(total, axis=0)
    if sink_logits is not None:
        whole += tl.exp2(tl.load(sink_logits + head) * LOG2_OF_E - base)
    inverse = tl.where(whole == 0.0, 0.0, 1.0 / tl.where(whole == 0.0, 1.0, whole))
    result = tl.sum(gradient, axis=0) * (scale * inverse)
    tl.store(
        grad_query + place * DIM + column, rounded(result, grad_query.dtype.element_ty), mask=column < DIM
    )
    tl.store(rows + place, delta)
    tl.store(rows + rows_half + place, inverse)


def takes_tiles(dtype: torch.dtype, shared: int) -> bool:
    """Whether heads of a unit go through `tl.dot`: in float32 the vector code is as fast, and exact for a large LSE."""
    return is_half(dtype) and shared >= 4


def tile_configs(shared: int, dim: int, value_dim: int) -> list[dict[str, int]]:
    """Block sizes of `_tile_queries`: dQ and one of dK, dV of a block are in registers at once.

    The others: fewer keys at once with fewer registers, more of them with more warps.
    """
    wide = max(dim, value_dim) > 128
    size = 16 if wide else 32
    heads = {"BLOCK_M": min(32, max(16, triton.next_power_of_2(shared)))}
    return [
        heads | {"BLOCK_K": keys, "num_warps": warps, "num_stages": stages}
        for keys, warps, stages in ((size, 4, 2), (16, 4, 3), (2 * size, 8, 2), (size, 8, 2))
    ]


def chunk_of(query_length: int, largest: int) -> int:
    """A chunk of at most `largest` queries (at least one), such that the chunks are of one size."""
    chunks = triton.cdiv(query_length, max(1, largest))
    return triton.cdiv(query_length, chunks)


def gathered_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    scale: float,
    softcap: float,  # 0: none
    sink_logits: Tensor | None,  # float32 [Hq]
    atomics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    batch, heads, query_length, dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    groups, budget = indices.shape[1], indices.shape[3]
    if out.numel() == 0 or budget == 0 or key_length == 0:
        return tuple(t.new_zeros(t.shape) for t in (query, key, value))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    inputs = (grad_out, grad_lse, query, key, value, indices, out.contiguous(), lse.contiguous())
    strides = tuple(s for t in (grad_out, query, key, value, indices) for s in t.stride())
    dims = {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim)),
    }
    launch = _by_tiles if takes_tiles(query.dtype, heads // max(groups, kv_heads)) else _by_heads
    sizes = (batch, heads, kv_heads, groups, query_length, key_length, budget)
    scales = (*factors(scale, softcap, LOG2E), scale)
    grad_query, grad_key, grad_value = launch(inputs, sink_logits, strides, sizes, scales, dims, atomics)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _sums(key: Tensor, value: Tensor, chunks: int, atomics: bool) -> tuple[Tensor, Tensor]:
    """Where dK and dV are made: in float32 where they are added to more than once."""
    if atomics:
        return tuple(torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    dtype = key.dtype if chunks == 1 else torch.float32
    return key.new_empty(key.shape, dtype=dtype), value.new_empty(value.shape, dtype=dtype)


def _by_tiles(inputs, sink_logits, strides, sizes, scales, dims, atomics):
    # The LSE has the sink logits in it, and nothing else is needed of them here.
    _, _, query, key, value, indices, _, _ = inputs
    batch, heads, kv_heads, groups, query_length, key_length, budget = sizes
    shared = heads // kv_heads
    configs = tile_configs(shared, dims["DIM"], dims["VALUE_DIM"])
    tiles = triton.cdiv(shared, configs[0]["BLOCK_M"])
    # float16 has too small a range for a single entry's gradient; it is bfloat16's rounding or none.
    dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
    programs = batch * kv_heads * tiles
    bytes_per_query = programs * budget * (dims["DIM"] + dims["VALUE_DIM"]) * dtype.itemsize
    largest = min(SCRATCH_BYTES // bytes_per_query, LISTED_ENTRIES // (batch * groups * budget))
    chunk = query_length if atomics else chunk_of(query_length, largest)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = _sums(key, value, triton.cdiv(query_length, chunk), atomics)
    totals = (grad_key, grad_value)
    if not atomics:
        totals = tuple(
            query.new_empty((programs, chunk, budget, dims[n]), dtype=dtype) for n in ("DIM", "VALUE_DIM")
        )
    shape = _shape(query, shared, dims, budget, chunk * programs)
    for first in range(0, query_length, chunk):
        size = min(chunk, query_length - first)
        _run(
            "tile", shape, configs, atomics, _tile_queries,
            grid_of(size, programs), *inputs, grad_query, *totals, *strides, programs, tiles, shared, kv_heads,
            groups, first, query_length, key_length, budget, *scales, ATOMICS=atomics, **dims,
        )  # fmt: skip
        if atomics:
            continue
        order, offsets = key_lists(indices, key_length, first, size)
        _run(
            "entries", shape, sum_configs(dims["DIM"], dims["VALUE_DIM"]), first > 0,
            sum_entries, grid_of(key_length, batch * kv_heads), *totals, order, offsets, grad_key, grad_value,
            batch * kv_heads, tiles, kv_heads, groups, size * budget, ADD=first > 0, **dims,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _by_heads(inputs, sink_logits, strides, sizes, scales, dims, atomics):
    grad_out, _, query, key, value, indices, _, lse = inputs
    batch, heads, kv_heads, groups, query_length, key_length, budget = sizes
    chunk = chunk_of(query_length, LISTED_ENTRIES // (batch * groups * budget))
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = _sums(key, value, triton.cdiv(query_length, chunk), atomics)
    rows = query.new_empty((2, batch, heads, query_length), dtype=torch.float32)
    shape = _shape(query, heads // kv_heads, dims, budget, query_length * batch * heads)
    _run(
        "vector", shape, vector_configs(dims["DIM"], dims["VALUE_DIM"], 4096),
        atomics, _vector_queries, grid_of(query_length, batch * heads), *inputs, sink_logits, grad_query, rows,
        grad_key, grad_value, *strides, batch * heads, heads, kv_heads, groups, key_length, budget, lse.numel(),
        *scales, ATOMICS=atomics, **dims,
    )  # fmt: skip
    for first in range(0, 0 if atomics else query_length, chunk):
        size = min(chunk, query_length - first)
        order, offsets = key_lists(indices, key_length, first, size)
        _run(
            "queries", shape, sum_configs(dims["DIM"], dims["VALUE_DIM"]), first > 0,
            sum_queries, grid_of(key_length, batch * kv_heads), grad_out, query, key, value, lse, rows, order,
            offsets, grad_key, grad_value, *strides[:16], batch * kv_heads, heads, kv_heads, groups, first,
            query_length, size * budget, budget, lse.numel(), *scales, ADD=first > 0, **dims,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _shape(query: Tensor, shared: int, dims: dict, budget: int, programs: int) -> tuple:
    return query.dtype, shared, dims["DIM"], dims["VALUE_DIM"], size_class(budget), size_class(programs)


def _run(name, shape, configs, adds, kernel, grid, *arguments, **options) -> None:
    """One launch; one that `adds` to its results would add again if it were repeated."""
    run_tuned(
        f"gathered_attention_backward {name}",
        shape,
        configs,
        lambda config: kernel[grid](*arguments, **options, **config),
        arguments[0].device,
        repeatable=not adds,
    )
