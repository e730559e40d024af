"""The kernel of `topk_select`: it streams keys past tiles of queries, and appends, cuts and emits their candidates."""

from __future__ import annotations

import triton
import triton.language as tl

from .among import any_in_blocks, in_blocks
from .candidates import LARGEST, count_passes, cut_in_place, pack
from .dot import dot
from .key_bounds import highest_scores
from .key_tiles import load_keys, load_queries
from .merge_pieces import emit, kept_until
from .pages import follows, key_places, last_of_tile
from .shared_scores import attention_mass, indexer_scores, scaled
from .visible_keys import first_keys, last_keys, window_starts


@triton.jit
def _ranks(
    queries,  # [D, BM], where each head selects for itself
    own_scale,  # float32 [BM], of those where they are rounded
    norm_factor,  # float32 [BM], of an index: what bounds are made of (key_bounds.py)
    error_factor,
    rest,
    query_rows,  # pointer to each query of the first head, [BM]
    key_head,
    per_head,  # pointer to each query's LSE, or its weight, of the first head, [BM], or None
    key_scale,  # pointer to the scales of the first head's keys, or None
    query_scale,  # pointer to each query's scale of the first head, [BM], or None
    query_h,
    query_d,
    key_h,
    key_d,
    query_length,
    key_length,
    head,
    index,  # int32 [BN]
    place,  # int64 [BN]: where they lie
    exists,  # bool [BN]
    inside_depth,
    depth,
    factor,
    bound,
    WHOLE: tl.constexpr,  # all of the keys exist
    INDEXED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARING: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What ranks these keys for these queries, float32 [BN, BM]."""
    if INDEXED:
        score = highest_scores(
            queries, own_scale, norm_factor, error_factor, rest, key_head, key_scale, key_d, index, exists, depth,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif WEIGHTED:
        score = indexer_scores(
            query_rows, key_head, per_head, key_scale, query_h, query_d, key_d, query_length, head, index,
            place, exists, inside_depth, depth, SHARING, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif SHARING > 1:
        score = attention_mass(
            query_rows, key_head, per_head, key_scale, query_scale, query_h, query_d, key_h, key_d,
            query_length, key_length, head, index, place, exists, inside_depth, depth, factor, bound,
            SHARING, REPEAT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        if WHOLE:
            keys = load_keys(key_head, place, None, key_d, depth, inside_depth)
        else:
            keys = load_keys(key_head, place, exists, key_d, depth, inside_depth)
        score = dot(keys, queries, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        score = scaled(score, key_scale, own_scale, index, exists)
    return score


@triton.jit
def _sum_of(passes):
    """How many of each column pass. (LLVM makes a population count of it, for which it takes 8 bytes of stack.)"""
    return tl.sum(passes.to(tl.int32), 0)


@triton.jit
def _next_tile(
    queue,
    tiles,
    splits,
    query_blocks,
    groups,
    starts,
    starts_b,
    starts_t,
    QUERIES: tl.constexpr,
    OF_SEQUENCES: tl.constexpr,  # a tile for each query, which has nothing to do where it follows another
):
    """A queue, not a stride: tiles of causal attention differ in cost. Who takes a tile changes nothing in it."""
    tile = tl.atomic_add(queue, 1)
    if OF_SEQUENCES:
        idle = tile < tiles
        while idle:
            block = query_blocks - 1 - (tile // splits) % query_blocks
            batch = ((tile // splits) // query_blocks // groups).to(tl.int64)
            idle = follows(block, starts, batch, starts_b, starts_t, QUERIES)
            if idle:
                tile = tl.atomic_add(queue, 1)
                idle = tile < tiles
    return tile


@triton.jit(
    do_not_specialize=[
        "query_length",
        "key_length",
        "slack",
        "causal_offset",
        "window_offset",
        "first_kept",
        "tiles",
        "query_blocks",
        "splits",
        "block_count",
        "query_tiles",
        "pages",
        "starts_b",
        "offsets_b",
    ]
)
def select_tiles(
    query,  # [B, Hq, Tq, D]
    key,  # [B, Hkv, Tk, D]; of an index its codes int8 [B, Hkv, N, words, 16, 4]
    mask,  # uint8 [B, G, Tq, Tk] or None
    lengths,  # int [B] or None
    starts,  # int [B, Tq] or None
    offsets,  # int [B, Tq] or None: causal offsets, where each query has its own
    table,  # int32 [S · pages]: of keys in pages, whose queries have starts; or None
    words,  # int32 [B, G, tiles, ⌈blocks / 32⌉]: the blocks whose keys alone may be chosen, or None
    key_scale,  # float32 [B, Hkv, Tk]: of keys that are rounded to int8, or None; of an index [B, Hkv, N, 3, 16]
    query_scale,  # float32 [B, Hq, Tq]: of queries likewise, or None; beside an index margins [B, Hq, Tq, 4]
    per_head,  # float32 [B, Hq, Tq]: LSE of each head where heads share, weight of each of an indexer's; or None
    redo,  # int32 [B, Hq, Tq]: tiles without a row that is not 0 are there already; or None
    slots,  # int64 [programs, BLOCK_M, CAPACITY + BLOCK_N], scratch
    counts,  # int32 [programs, BLOCK_M], scratch
    thresholds,  # float32 [programs, BLOCK_M], scratch
    queue,  # int32 [1]: the next tile
    indices,  # int32 [B, G, Tq, K], or where keys are split int64 slots [B, G, Tq, splits, K]
    scores,  # float32 [B, G, Tq, K] or None
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,  # of an index: how far the bounds of two heads lie apart,
    key_d,  # and how many words a key has
    mask_b,
    mask_g,
    mask_q,
    mask_k,
    starts_b,
    starts_t,
    offsets_b,
    offsets_t,
    groups,  # G / PACK
    query_length,
    key_length,
    head_dim,
    budget,
    slack,
    causal_offset,  # query i sees keys up to i + causal_offset
    window_offset,  # and always keeps those beyond i + window_offset
    first_kept,
    factor,  # of q·k where heads share: the scale; with a cap scale / softcap
    bound,  # softcap, or None
    tiles,
    query_blocks,  # with pages as many as queries: of each that does not follow another begins a tile
    splits,
    split_length,  # keys, a multiple of BLOCK_N; with pages so many parts of each sequence
    pages,  # how many there are
    block_size,  # of the blocks
    block_count,
    query_tile,  # queries that share a choice of blocks
    query_tiles,
    INDEXED: tl.constexpr,  # keys are ranked by the highest scores that an index leaves possible
    WEIGHTED: tl.constexpr,  # an indexer's heads
    SIGN: tl.constexpr,  # of the scale: −1, 0, 1; ranks need no more of it
    IS_CAUSAL: tl.constexpr,
    SHARING: tl.constexpr,  # query heads of one selection
    REPEAT: tl.constexpr,  # query heads of one key head
    SPLIT: tl.constexpr,
    PACK: tl.constexpr,  # query heads of a tile, each with a selection of its own: 1, or those of a key head
    PAGE: tl.constexpr,  # keys of a page
    BLOCK_M: tl.constexpr,  # rows of a tile: queries, or each of some queries for each head
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,  # queries whose candidates are cut together
    CHUNK: tl.constexpr,  # columns of candidates in registers while the cut is searched
    STEP: tl.constexpr,  # and while it is made
    EDGE_STAGES: tl.constexpr,  # of the loop at the edges, which is short unless there is a mask
):
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    STRIDE: tl.constexpr = CAPACITY + BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    slots += program * (BLOCK_M * STRIDE)
    counts += program * BLOCK_M
    thresholds += program * BLOCK_M
    own_slots = slots + row * STRIDE
    inside_depth = depth < head_dim

    QUERIES: tl.constexpr = BLOCK_M // PACK
    PARTLY: tl.constexpr = PACK > 1 or table is not None  # some rows may have no query: those see nothing
    tile = _next_tile(
        queue, tiles, splits, query_blocks, groups, starts, starts_b, starts_t, QUERIES, table is not None
    )
    while tile < tiles:
        split = tile % splits
        block = query_blocks - 1 - (tile // splits) % query_blocks  # the longest rows of a head come first
        group = (tile // splits) // query_blocks  # of all batch entries
        batch = (group // groups).to(tl.int64)
        head = ((group % groups) * (PACK * SHARING)).to(tl.int64)  # the first
        if table is None:
            first_row = block * QUERIES
            last_row = tl.minimum(first_row + QUERIES, query_length) - 1
        else:
            first_row = block
            last_row = last_of_tile(
                first_row, starts, batch, starts_b, starts_t, query_length, QUERIES, BLOCK_M
            )
        wanted_row = first_row + row // PACK
        position = tl.minimum(wanted_row, last_row)  # rows past the end repeat the last one
        member = (row % PACK).to(tl.int64)  # of the heads

        length = key_length
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), key_length).to(tl.int32)
        if IS_CAUSAL:
            row_end = last_keys(offsets, batch, position, offsets_b, offsets_t, causal_offset, length)
            window_start = window_starts(
                offsets, batch, position, offsets_b, offsets_t, window_offset, key_length
            )
            if offsets is None:
                tile_end = tl.minimum(tl.maximum(last_row + causal_offset + 1, 0), length)
                plain_end = tl.minimum(first_row + tl.minimum(causal_offset, window_offset) + 1, length)
            else:
                tile_end = tl.max(row_end, 0)
                plain_end = tl.min(tl.minimum(row_end, window_start), 0)
        else:
            row_end = tl.zeros_like(position) + length
            window_start = tl.zeros_like(position) + LARGEST
            tile_end = length
            plain_end = length
        if PARTLY:
            row_end = tl.where(wanted_row <= last_row, row_end, 0)
        # Key tiles of [plain_first, plain_stop) are seen whole by every row, and hold no forced key.
        n = split * (split_length // BLOCK_N)
        n_stop = tl.minimum(tl.cdiv(tile_end, BLOCK_N), n + split_length // BLOCK_N)
        if starts is None:
            plain_first = tl.cdiv(first_kept, BLOCK_N)
        else:
            row_start = first_keys(starts, batch, position, starts_b, starts_t, key_length)
            kept_end = row_start + tl.minimum(first_kept, key_length - row_start)
            plain_first = tl.cdiv(tl.max(kept_end, 0), BLOCK_N)
            if table is None:
                n = tl.maximum(n, tl.min(row_start, 0) // BLOCK_N)
            else:
                n_begin, n_end = tl.min(row_start, 0) // BLOCK_N, tl.cdiv(tile_end, BLOCK_N)
                part = tl.cdiv(tl.maximum(n_end - n_begin, 0), splits)
                n = n_begin + split * part
                n_stop = tl.minimum(n_end, n + part)
        plain_stop = tl.maximum(plain_end, 0) // BLOCK_N
        if PARTLY:
            plain_stop = plain_stop * 0
        if mask is not None:
            plain_stop = plain_stop * 0
            mask_rows = (
                mask
                + batch * mask_b
                + ((group % groups) * PACK + member) * mask_g
                + position.to(tl.int64) * mask_q
            )
        query_rows = query + batch * query_b + (head + member) * query_h + position.to(tl.int64) * query_t
        key_head = key + batch * key_b + (head // REPEAT) * key_h
        per_head_rows, key_scale_head, query_scale_rows = per_head, key_scale, query_scale
        of_row = (batch * (groups * PACK * SHARING) + head + member) * query_length + position
        own_scale, norm_factor, error_factor, rest = 1.0, 1.0, 1.0, 1.0
        if per_head is not None:
            per_head_rows = per_head + of_row
        if key_scale is not None:
            of_key_head = batch * (groups * PACK * SHARING // REPEAT) + head // REPEAT
            if INDEXED:
                key_scale_head = key_scale + of_key_head * key_t
            else:
                key_scale_head = key_scale + of_key_head * key_length
        if query_scale is not None:
            if INDEXED:
                query_scale_rows = query_scale + of_row * 4
                norm_factor = tl.load(query_scale_rows + 1)
                error_factor = tl.load(query_scale_rows + 2)
                rest = tl.load(query_scale_rows + 3)
            else:
                query_scale_rows = query_scale + of_row
            own_scale = tl.load(query_scale_rows)
        last_written = last_row
        if redo is not None:
            missing = tl.max(tl.load(redo + of_row), 0)
            n_stop = tl.where(missing != 0, n_stop, n)
            last_written = tl.where(missing != 0, last_row, -1)
        if words is not None:
            plain_stop = plain_stop * 0
            words_rows = words + ((group * PACK + member) * query_tiles + position // query_tile) * (
                (block_count + 31) // 32
            )

        # Counts and thresholds live in memory between stretches, so that each loop keeps them in a layout of its own.
        tl.store(counts + row, tl.zeros_like(row))
        tl.store(thresholds + row, tl.full([BLOCK_M], float("nan"), tl.float32))  # all pass: not (NaN >= x)
        longest = 0
        reach = 1
        while n < n_stop:
            tl.debug_barrier()
            if longest > CAPACITY - BLOCK_N:
                for first in range(0, BLOCK_M, ROWS):
                    some = first + tl.arange(0, ROWS)
                    some_at = tl.minimum(first_row + some // PACK, last_row)
                    some_start = LARGEST + tl.zeros_like(some)
                    if IS_CAUSAL:
                        some_start = window_starts(
                            offsets, batch, some_at, offsets_b, offsets_t, window_offset,
                            key_length,
                        )  # fmt: skip
                    some_kept = first_kept
                    if starts is not None:
                        some_kept = kept_until(
                            starts, batch, some_at, starts_b, starts_t, key_length,
                            first_kept,
                        )  # fmt: skip
                    kept, bar = cut_in_place(
                        slots + some * STRIDE, tl.load(counts + some), some_kept, some_start, budget, slack,
                        CAPACITY, CHUNK, STEP,
                    )  # fmt: skip
                    tl.store(counts + some, kept)
                    tl.store(thresholds + some, bar)
                tl.debug_barrier()
                longest = tl.max(tl.load(counts + row), 0)
            room = CAPACITY - longest
            plain = (n >= plain_first) & (n < plain_stop)
            stop = tl.minimum(n_stop, n + tl.maximum(room // BLOCK_N, reach))
            if plain:
                stop = tl.minimum(stop, plain_stop)
            elif n < plain_stop:
                stop = tl.minimum(stop, plain_first)
            count = tl.load(counts + row)
            threshold = tl.load(thresholds + row)
            if plain:
                queries = 0.0
                if SHARING == 1 and not WEIGHTED:
                    queries = load_queries(query_rows, query_d, depth, inside_depth, SIGN)
                for tile_n in range(n, stop):
                    index = tile_n * BLOCK_N + column
                    score = _ranks(
                        queries, own_scale, norm_factor, error_factor, rest, query_rows, key_head, per_head_rows,
                        key_scale_head, query_scale_rows, query_h, query_d, key_h, key_d, query_length, key_length,
                        head, index, index.to(tl.int64) * key_t, index < tile_end, inside_depth, depth, factor, bound,
                        True, INDEXED, WEIGHTED, SHARING, REPEAT, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    # The threshold stands first: the type of the comparison follows its first operand.
                    passes = ~(threshold[None, :] >= score)
                    start = own_slots + tl.minimum(count, CAPACITY) - 1
                    count += _sum_of(passes)
                    score, place = tl.associative_scan((score, passes.to(tl.int32)), 0, count_passes)
                    slot = pack(score, index[:, None])
                    tl.store(start[None, :] + place, slot, mask=~(threshold[None, :] >= score))
            else:
                queries = 0.0
                if SHARING == 1 and not WEIGHTED:
                    queries = load_queries(query_rows, query_d, depth, inside_depth, SIGN)
                for tile_n in tl.range(n, stop, num_stages=EDGE_STAGES):
                    index = tile_n * BLOCK_N + column
                    where, exists = key_places(
                        tile_n * BLOCK_N, index, index < tile_end, table, pages, key_b, key_t, PAGE, BLOCK_N
                    )
                    wanted = True
                    if words is not None:  # most tiles have no key that may be chosen
                        some = (
                            any_in_blocks(words_rows, tile_n * BLOCK_N, block_size, block_count, BLOCK_N) > 0
                        )
                        some |= (tile_n + 1) * BLOCK_N > tl.min(window_start, 0)
                        if starts is None:
                            wanted = some | (tile_n * BLOCK_N < first_kept)
                        else:
                            wanted = some | (tile_n * BLOCK_N < tl.max(kept_end, 0))
                    if wanted:
                        score = _ranks(
                            queries, own_scale, norm_factor, error_factor, rest, query_rows, key_head,
                            per_head_rows, key_scale_head, query_scale_rows, query_h, query_d, key_h, key_d,
                            query_length, key_length, head, index, where, exists, inside_depth, depth, factor, bound,
                            False, INDEXED, WEIGHTED, SHARING, REPEAT, BLOCK_M, BLOCK_N,
                        )  # fmt: skip
                        kept = index[:, None] >= window_start[None, :]
                        seen = index[:, None] < row_end[None, :]
                        if starts is None:
                            kept |= (index < first_kept)[:, None]
                        else:
                            kept |= index[:, None] < kept_end[None, :]
                            seen &= index[:, None] >= row_start[None, :]
                        if table is not None:
                            seen &= exists[:, None]
                        passes = ~(threshold[None, :] >= score) & seen
                        if words is not None:
                            passes &= in_blocks(words_rows, index, block_size, passes)
                        passes |= kept & seen
                        if mask is not None:
                            allowed = tl.load(
                                mask_rows[None, :] + index.to(tl.int64)[:, None] * mask_k,
                                mask=passes,
                                other=0,
                            )
                            passes &= allowed != 0
                        start = own_slots + tl.minimum(count, CAPACITY) - 1
                        count += _sum_of(passes)
                        score, place = tl.associative_scan((score, passes.to(tl.int32)), 0, count_passes)
                        slot = pack(score, index[:, None])
                        tl.store(start[None, :] + place, slot, mask=passes)
            after = tl.max(count, 0)
            if after <= CAPACITY:
                tl.debug_barrier()
                tl.store(counts + row, count)
                longest = after
                reach = 2 * (stop - n)
                n = stop
            else:
                reach = 1  # as if the stretch had not been: its candidates lie behind the counts in memory

        tl.debug_barrier()
        for first in range(0, BLOCK_M, ROWS):
            some = first + tl.arange(0, ROWS)
            some_at = tl.minimum(first_row + some // PACK, last_row)
            valid = first_row + some // PACK <= last_written
            some_start = LARGEST + tl.zeros_like(some)
            if IS_CAUSAL:
                some_start = window_starts(
                    offsets, batch, some_at, offsets_b, offsets_t, window_offset,
                    key_length,
                )  # fmt: skip
            some_kept = first_kept
            if starts is not None:
                some_kept = kept_until(
                    starts,
                    batch,
                    some_at,
                    starts_b,
                    starts_t,
                    key_length,
                    first_kept,
                )
            out_row = (group * PACK + some % PACK).to(tl.int64) * query_length + first_row + some // PACK
            emit(
                slots + some * STRIDE, tl.load(counts + some), valid, some_kept, some_start, budget,
                (out_row * splits + split) * budget, indices, scores, SPLIT, CAPACITY, CHUNK, STEP,
            )  # fmt: skip
        tl.debug_barrier()  # the next tile overwrites what some thread may still read
        tile = _next_tile(
            queue, tiles, splits, query_blocks, groups, starts, starts_b, starts_t, QUERIES, table is not None
        )
