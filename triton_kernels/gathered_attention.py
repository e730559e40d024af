"""`gathered_attention`, forward: each query's keys and values gathered by index, one online softmax over them.

Floor: the gather. A selection of K keys moves K·(D + Dv) elements per query and per set of heads that share both
the selection and the key head ("unit"), from the second-level cache while one head's keys and values fit into it:
at T = 32k, K = 512, D = 128 in bf16 and one unit 8.6 GB, or 1.6 ms at 5.5 TB/s, against 0.3 ms of products on the
tensor cores. So a unit's heads are the rows of one tile and each key is gathered once for all of them (`_tile`); a
head that shares with no other has nothing to multiply as a matrix, and vector code (`_vector`) keeps up with its
gathers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lib.common import LN2, LOG2_OF_E, LOG2E, grid_of, is_half, outer_program, rounded
from .lib.dot import dot
from .lib.rows import gather_rows, load_rows, multiply_rows, vector_configs
from .lib.soft_cap import capped, factors
from .lib.softmax import first_of_softmax, softmax_step
from .lib.tuning import distinct, run_tuned, size_class


@triton.jit(do_not_specialize=["programs", "key_length"])
def _tile(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    value,  # [B, Hkv, Tk, Dv]
    indices,  # int32 [B, G, Tq, K]
    sink_logits,  # float32 [Hq], contiguous, or None
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    query_b, query_h, query_t, query_d,
    key_b, key_h, key_t, key_d,
    value_b, value_h, value_t, value_d,
    indices_b, indices_g, indices_t, indices_k,
    programs,  # B · units · tiles
    units,  # max(G, Hkv): sets of heads that share a selection and a key head
    tiles,  # of BLOCK_M heads in a unit
    shared,  # heads in a unit
    kv_heads,
    groups,
    key_length,
    budget,
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query, up to BLOCK_M heads of one unit."""
    program = outer_program()
    if program >= programs:
        return
    t = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    unit = program // tiles % units
    b = (program // tiles // units).to(tl.int64)
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (unit * shared + member).to(tl.int64)
    present = member < shared
    kv_head = unit * kv_heads // units
    rows_of = indices + b * indices_b + (unit * groups // units).to(tl.int64) * indices_g + t * indices_t
    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    queries = load_rows(
        query + b * query_b + t * query_t, head, present, query_h, query_d, DIM, BLOCK_DIM
    )  # [BLOCK_M, D]

    largest, total = first_of_softmax(sink_logits, head, present, BLOCK_M)
    mean = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
    for start in range(0, budget, BLOCK_K):
        row, filled = gather_rows(rows_of, start, indices_k, budget, key_length, BLOCK_K)
        _, scores = multiply_rows(queries, key, row, filled, key_t, key_d, DIM, BLOCK_DIM, BLOCK_M, BLOCK_K)
        values = load_rows(value, row, filled, value_t, value_d, VALUE_DIM, BLOCK_VALUE)
        scores = tl.where(filled[None, :], capped(scores * factor, bound), float("-inf"))
        weights, shrink, largest, total = softmax_step(scores, largest, total)
        mean = dot(rounded(weights, values.dtype), values, mean * shrink[:, None])

    place = (b * units * shared + head) * tl.num_programs(0) + t
    column = tl.arange(0, BLOCK_VALUE)
    total = tl.where(total == 0.0, 1.0, total)  # nothing attended to: 0, and an LSE of −inf by `largest`
    tl.store(
        out + place[:, None] * VALUE_DIM + column[None, :],
        rounded(mean / total[:, None], out.dtype.element_ty),
        mask=present[:, None] & (column < VALUE_DIM)[None, :],
    )
    tl.store(lse + place, (largest + tl.log2(total)) * LN2, mask=present)


@triton.jit(do_not_specialize=["programs", "key_length"])
def _vector(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    value,  # [B, Hkv, Tk, Dv]
    indices,  # int32 [B, G, Tq, K]
    sink_logits,  # float32 [Hq], contiguous, or None
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
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
    factor,  # scale · log2 e; with a cap scale / softcap
    bound,  # softcap · log2 e, or None
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query of one head. Each slot of a block has a softmax of its own, and they meet at the end: in the loop
    no warp waits for another.
    """
    program = outer_program()
    if program >= programs:
        return
    t = tl.program_id(0).to(tl.int64)
    head = program % heads
    b = (program // heads).to(tl.int64)
    kv_head = head * kv_heads // heads
    rows_of = indices + b * indices_b + (head * groups // heads).to(tl.int64) * indices_g + t * indices_t
    query += b * query_b + head.to(tl.int64) * query_h + t * query_t
    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    column = tl.arange(0, BLOCK_DIM)
    vector = tl.load(query + column.to(tl.int64) * query_d, mask=column < DIM, other=0.0).to(tl.float32)

    largest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    mean = tl.zeros((BLOCK_K, BLOCK_VALUE), tl.float32)
    row, filled = gather_rows(rows_of, 0, indices_k, budget, key_length, BLOCK_K)
    for start in range(0, budget, BLOCK_K):
        # The next block's indices are on their way while this one's rows are.
        next_row, next_filled = gather_rows(rows_of, start + BLOCK_K, indices_k, budget, key_length, BLOCK_K)
        keys = load_rows(key, row, filled, key_t, key_d, DIM, BLOCK_DIM).to(tl.float32)
        values = load_rows(value, row, filled, value_t, value_d, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
        scores = capped(tl.sum(keys * vector[None, :], axis=1) * factor, bound)
        scores = tl.where(filled, scores, float("-inf"))
        larger = tl.maximum(largest, scores)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(largest - base)
        total = total * shrink + weights
        mean = mean * shrink[:, None] + weights[:, None] * values
        largest, row, filled = larger, next_row, next_filled

    top = tl.max(largest, axis=0)
    if sink_logits is not None:
        sink = tl.load(sink_logits + head) * LOG2_OF_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(largest - base)
    whole = tl.sum(total * shrink, axis=0)
    if sink_logits is not None:
        whole += tl.exp2(sink - base)
    whole = tl.where(whole == 0.0, 1.0, whole)
    result = tl.sum(mean * shrink[:, None], axis=0) / whole
    place = (b * heads + head) * tl.num_programs(0) + t
    column = tl.arange(0, BLOCK_VALUE)
    tl.store(out + place * VALUE_DIM + column, rounded(result, out.dtype.element_ty), mask=column < VALUE_DIM)
    tl.store(lse + place, (top + tl.log2(whole)) * LN2)


def takes_tiles(dtype: torch.dtype, shared: int) -> bool:
    """Whether the heads of a unit go through `tl.dot`: in the half types its 16 rows cost less than gathering again;
    in float32, where a product is no cheaper there, half of the rows must be used.
    """
    return shared >= (2 if is_half(dtype) else 8)


def tile_configs(dtype: torch.dtype, shared: int, dim: int, value_dim: int) -> list[dict[str, int]]:
    """Block sizes of `_tile`; two stages of gathered rows stay below 64 KiB in the first.

    The others: fewer rows in flight with more programs on a multiprocessor, or more of them with more warps.
    """
    wide = max(dim, value_dim) > 128
    size = 16 if not is_half(dtype) else 32 if wide else 64
    heads = {"BLOCK_M": min(64, max(16, triton.next_power_of_2(shared)))}
    some = ((size, 4, 2), (max(16, size // 2), 4, 3), (size, 4, 3), (2 * size, 8, 2))
    return distinct(
        [heads | {"BLOCK_K": keys, "num_warps": warps, "num_stages": stages} for keys, warps, stages in some]
    )


def gathered_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    scale: float,
    softcap: float,  # 0: none
    sink_logits: Tensor | None,  # float32 [Hq]
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    batch, heads, query_length, dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    groups, budget = indices.shape[1], indices.shape[3]
    out = query.new_empty((batch, heads, query_length, value_dim))
    lse = query.new_empty((batch, heads, query_length), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    units = max(groups, kv_heads)
    shared = heads // units
    tensors = (query, key, value, indices, sink_logits, out, lse)
    strides = (*query.stride(), *key.stride(), *value.stride(), *indices.stride())
    sizes = (kv_heads, groups, key_length, budget, *factors(scale, softcap, LOG2E))
    dims = {
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
        "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim)),
    }
    if takes_tiles(query.dtype, shared):
        name, configs = "tile", tile_configs(query.dtype, shared, dim, value_dim)
        tiles = triton.cdiv(shared, configs[0]["BLOCK_M"])
        programs = batch * units * tiles
        kernel, counts = _tile, (programs, units, tiles, shared)
    else:
        name, configs = "vector", vector_configs(dim, value_dim, 2048 if is_half(query.dtype) else 1024)
        programs = batch * heads
        kernel, counts = _vector, (programs, heads)
    grid = grid_of(query_length, programs)
    run_tuned(
        f"gathered_attention {name}",
        (query.dtype, shared, dim, value_dim, size_class(budget), size_class(query_length * programs)),
        configs,
        lambda config: kernel[grid](*tensors, *strides, *counts, *sizes, **dims, **config),
        query.device,
    )
    return out, lse
