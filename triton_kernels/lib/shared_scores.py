"""What ranks a key where query heads share a selection: its softmax probability summed over the heads, or the sum of an
indexer's heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot
from .key_tiles import load_keys, load_queries
from .soft_cap import capped

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled(
    score,  # float32 [BN, BM]
    key_scale,  # pointer to the scales of rounded keys, or None
    query_scale,  # float32 [BM], of the rounded queries
    index,  # int32 [BN]
    exists,  # bool [BN]
):
    """Scores of rounded rows, in the order of the reference's products; others as they are."""
    if key_scale is not None:
        score = score * tl.load(key_scale + index, mask=exists, other=0.0)[:, None] * query_scale[None, :]
    return score


@triton.jit
def indexer_scores(
    query_rows,  # pointer to each query of the first head, [BM]
    key_head,  # pointer to the keys of all its heads
    weight_rows,  # pointer to each query's weight of the first head, [BM]
    key_scale,  # pointer to the scales of rounded keys, or None
    query_h,
    query_d,
    key_d,
    query_length,
    head,  # number of the first head
    index,  # int32 [BN]
    place,  # int64 [BN]: where they lie
    exists,  # int1 [BN]
    inside_depth,
    depth,
    SHARING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ over the heads of weight · max(0, q·k), float32 [BN, BM]; scales of rounded queries are in the weights."""
    keys = load_keys(key_head, place, exists, key_d, depth, inside_depth)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for number in range(SHARING):
        this = head + number - head  # 64 bits, as is what is made of it
        queries = load_queries(query_rows + this * query_h, query_d, depth, inside_depth, 1)
        product = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        weight = tl.load(weight_rows + this * query_length)
        total += tl.where(product < 0.0, 0.0, product) * weight[None, :]  # NaN stays NaN
    if key_scale is not None:
        total *= tl.load(key_scale + index, mask=exists, other=0.0)[:, None]
    return total


@triton.jit
def _mass_of_head(
    keys,  # [BN, D]
    query_rows,
    shift_rows,
    key_scale,
    query_scale,
    query_h,
    query_d,
    query_length,
    key_length,
    key_head,  # which of the group's key heads
    this,  # which of its heads
    index,
    exists,
    inside_depth,
    depth,
    factor,
    bound,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """exp(score − LSE) of one head, float32 [BN, BM]."""
    queries = load_queries(query_rows + this * query_h, query_d, depth, inside_depth, 1)
    score = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    if key_scale is not None:
        own_scale = tl.load(query_scale + this * query_length)
        score = scaled(score, key_scale + key_head * key_length, own_scale, index, exists)
    shift = tl.load(shift_rows + this * query_length)
    return tl.exp2((capped(score * factor, bound) - shift[None, :]) * LOG2_E)


@triton.jit
def attention_mass(
    query_rows,  # pointer to each query of the first head, [BM]
    key_head,  # pointer to the first head's keys
    shift_rows,  # pointer to each query's LSE of the first head, [BM]
    key_scale,  # pointer to the scales of the first head's rounded keys, or None
    query_scale,  # pointer to each rounded query's scale of the first head, [BM], or None
    query_h,
    query_d,
    key_h,
    key_d,
    query_length,
    key_length,
    head,  # number of the first head
    index,  # int32 [BN]
    place,  # int64 [BN]: where they lie
    exists,  # int1 [BN]
    inside_depth,
    depth,
    factor,  # the scale; with a cap scale / softcap
    bound,  # softcap, or None
    SHARING: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ over the sharing heads of exp(score − LSE), float32 [BN, BM]; a NaN score makes its own key NaN.

    A tile of keys is loaded once for all query heads of its key head.
    """
    mass = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if SHARING < REPEAT:
        SAME: tl.constexpr = SHARING
    else:
        SAME: tl.constexpr = REPEAT  # heads in a row have one key head
    for of_keys in range(SHARING // SAME):
        first = head - head + of_keys  # 64 bits, as is what is made of it
        keys = load_keys(key_head + first * key_h, place, exists, key_d, depth, inside_depth)
        if depth.shape[0] > 64 and BLOCK_M > 32:
            for number in range(SAME):
                mass += _mass_of_head(
                    keys, query_rows, shift_rows, key_scale, query_scale, query_h, query_d, query_length, key_length,
                    first, first * SAME + number, index, exists, inside_depth, depth, factor, bound, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        else:  # of few queries, or short ones, the next are not on their way meanwhile: no registers are left
            for number in tl.range(SAME, num_stages=1):
                mass += _mass_of_head(
                    keys, query_rows, shift_rows, key_scale, query_scale, query_h, query_d, query_length, key_length,
                    first, first * SAME + number, index, exists, inside_depth, depth, factor, bound, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    return mass
