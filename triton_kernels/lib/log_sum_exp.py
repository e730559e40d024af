"""The log-sum-exp of each head's scores, which heads that share a selection need before their keys can be ranked."""

from __future__ import annotations

import triton
import triton.language as tl

from .among import in_blocks
from .dot import dot
from .key_tiles import load_keys, load_queries
from .pages import follows, key_places, last_of_tile
from .shared_scores import LOG2_E, scaled
from .soft_cap import capped
from .visible_keys import first_keys, last_keys, window_starts


@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "causal_offset", "window_offset", "first_kept", "query_blocks", "block_count",
        "query_tiles", "pages", "starts_b", "offsets_b", "splits",
    ]
)  # fmt: skip
def log_sum_exp(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]
    mask,  # uint8 [B, G, Tq, Tk] or None
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    offsets,  # int [B, Tq] or None: causal offsets, where each query has its own
    table,  # int32 [S · pages]: of keys in pages, or None
    words,  # int32 [B, G, tiles, ⌈blocks / 32⌉]: the blocks whose keys alone count, or None
    key_scale,  # float32 [B, Hkv, Tk]: of rounded keys, or None
    query_scale,  # float32 [B, Hq, Tq]: of rounded queries, or None
    sink_logits,  # float32 [Hq] or None
    shift,  # float32 [splits, B, Hq, Tq], written
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,
    key_d,
    mask_b,
    mask_g,
    mask_q,
    mask_k,
    starts_b,
    starts_t,
    offsets_b,
    offsets_t,
    heads,
    query_length,
    key_length,
    head_dim,
    causal_offset,
    window_offset,
    first_kept,
    factor,  # the scale; with a cap scale / softcap
    bound,  # softcap, or None
    query_blocks,  # with pages as many as queries, of which those that follow another have nothing to do
    splits,  # of each tile's keys
    pages,
    block_size,
    block_count,
    query_tile,
    query_tiles,
    PAGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SHARING: tl.constexpr,
    REPEAT: tl.constexpr,
    PACK: tl.constexpr,  # query heads of a tile, which have one key head and one mask
    BLOCK_M: tl.constexpr,  # rows of a tile: each of some queries for each of its heads
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LSE of each query over the keys it sees and its head's sink, NaN left out; +inf where that is −inf, so that
    exp(x − it) is 0. Where keys are split, of each part; the sink is in the first, and −inf stays.

    The heads of a key head are rows of one tile, so that its keys are read once for all of them.
    """
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    inside_depth = depth < head_dim
    split = tl.program_id(1)
    block = query_blocks - 1 - tl.program_id(0) % query_blocks
    flat_head = tl.program_id(0) // query_blocks * PACK  # the first
    batch = (flat_head // heads).to(tl.int64)
    head = (flat_head % heads).to(tl.int64)
    QUERIES: tl.constexpr = BLOCK_M // PACK
    if table is None:
        first_row = block * QUERIES
        last_row = tl.minimum(first_row + QUERIES, query_length) - 1
    else:
        first_row = block
        if follows(first_row, starts, batch, starts_b, starts_t, QUERIES):
            return
        last_row = last_of_tile(first_row, starts, batch, starts_b, starts_t, query_length, QUERIES, BLOCK_M)
    wanted_row = first_row + row // PACK
    position = tl.minimum(wanted_row, last_row)
    member = (row % PACK).to(tl.int64)  # of the heads
    of_row = (flat_head.to(tl.int64) + member) * query_length + position
    length = key_length
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_length).to(tl.int32)
    row_end = tl.zeros_like(position) + length
    tile_end = length
    if IS_CAUSAL:
        row_end = last_keys(offsets, batch, position, offsets_b, offsets_t, causal_offset, length)
        if offsets is None:
            tile_end = tl.minimum(tl.maximum(last_row + causal_offset + 1, 0), length)
        else:
            tile_end = tl.max(row_end, 0)
    query_rows = query + batch * query_b + (head + member) * query_h + position.to(tl.int64) * query_t
    key_head = key + batch * key_b + (head // REPEAT) * key_h
    queries = load_queries(query_rows, query_d, depth, inside_depth, 1)
    if mask is not None:
        mask_rows = mask + batch * mask_b + (head // SHARING) * mask_g + position.to(tl.int64) * mask_q
    key_scale_head, own_scale = key_scale, 1.0
    if key_scale is not None:
        key_scale_head = key_scale + (batch * (heads // REPEAT) + head // REPEAT) * key_length
        own_scale = tl.load(query_scale + of_row)
    if words is not None:
        words_rows = words + (
            (batch * (heads // SHARING) + head // SHARING) * query_tiles + position // query_tile
        ) * ((block_count + 31) // 32)
        kept_end = tl.zeros_like(position) + first_kept
        window_start = row_end
        if IS_CAUSAL:
            window_start = window_starts(
                offsets, batch, position, offsets_b, offsets_t, window_offset, key_length
            )

    tile_start = 0
    if starts is not None:
        row_start = first_keys(starts, batch, position, starts_b, starts_t, key_length)
        tile_start = tl.min(row_start, 0) // BLOCK_N * BLOCK_N
        if words is not None:
            kept_end = row_start + tl.minimum(first_kept, key_length - row_start)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sink_logits is not None:
        sink = tl.load(sink_logits + head + member)
        top = tl.maximum(top, tl.where((sink == sink) & (split == 0), sink, float("-inf")))
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    part = tl.cdiv(tl.cdiv(tl.maximum(tile_end - tile_start, 0), BLOCK_N), splits) * BLOCK_N
    for first in range(
        tile_start + split * part, tl.minimum(tile_start + (split + 1) * part, tile_end), BLOCK_N
    ):
        index = first + column
        place, exists = key_places(first, index, index < tile_end, table, pages, key_b, key_t, PAGE, BLOCK_N)
        keys = load_keys(key_head, place, exists, key_d, depth, inside_depth)
        score = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        score = capped(scaled(score, key_scale_head, own_scale, index, index < tile_end) * factor, bound)
        seen = (index[:, None] < row_end[None, :]) & (score == score)
        if starts is not None:
            seen &= index[:, None] >= row_start[None, :]
        if table is not None:
            seen &= exists[:, None]
        if mask is not None:
            seen &= (
                tl.load(mask_rows[None, :] + index.to(tl.int64)[:, None] * mask_k, mask=seen, other=0) != 0
            )
        if words is not None:
            kept = (index[:, None] < kept_end[None, :]) | (index[:, None] >= window_start[None, :])
            seen &= kept | in_blocks(words_rows, index, block_size, seen)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((top - base) * LOG2_E) + tl.sum(tl.exp2((score - base[None, :]) * LOG2_E), 0)
        top = higher
    lse = tl.where(top == float("inf"), top, top + tl.log(total))
    rows = (tl.num_programs(0) // query_blocks * PACK).to(tl.int64)  # B · Hq
    if splits == 1:
        lse = tl.where(top == float("-inf"), float("inf"), lse)
    tl.store(
        shift + split * rows * query_length + of_row,
        lse,
        mask=wanted_row <= last_row,
    )
