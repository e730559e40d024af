"""`topk_select`: exact top-k keys of each query, in one pass over the keys and without a [Tq, Tk] matrix.

A program takes a tile of queries and streams tiles of keys through the tensor cores, keys along the rows of the
score tile and queries along its columns. A score that beats its query's running threshold is appended to the
query's candidates (candidates.py); when a row of candidates runs full, the rows are cut to their best and the
thresholds rise. Of n keys in random order about K (1 + ln(n / K)) are ever appended. Scratch memory belongs to the
resident programs, not to the queries: programs × BLOCK_M × capacity × 8 bytes.

Appending is optimistic: a stretch of key tiles is streamed without a check (which keeps the loop free of branches,
so that loads are pipelined); slots past the capacity are never written, and a stretch that overflowed is streamed
again in pieces that cannot. Ascending scores, the worst case, cost about three times the best one.

The floor is the product: 2 D operations per visible pair (T = 16k, 16 heads, D = 128, causal: 0.55 TFLOP, under 1 ms
on an H100), then about 20 instructions per score for compare, count and predicated store. A histogram of the scores
first and a second pass that emits would need the product twice, and exact bins still need the candidates' cut.

What a session with a GPU should compare, as nothing of this was measured:

- `configs` below: SPARSE_ATTN_TRITON_TUNE=1 times them, and the winner belongs in the first place. Instructions per
  128 × 32 scores of the loop over plain key tiles (sm_90, D = 128, all warps): 3,300 in Triton 3.9 for the first,
  3,800 to 4,700 for the others; 6,300 to 7,000 for each in Triton 3.6.
- In `topk_attention`, large budgets where each head selects for itself. Chosen is the gather of K values per query and
  head, since it needs only indices and scores; it is bound by the second-level cache (topk_attention.py). Its rival is
  a second dense pass: stream key tiles through the tensor cores again, mask by the row's threshold and its last tie's
  index, multiply by the values. That pass costs what dense attention costs, and no gather, so it should win from
  the K at which the gather takes longer than dense attention: 250 or so at D = 128, causal, T = 16k on an H100.

Where heads share a selection a key's score is its summed softmax probability (shared_scores.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.among import words_of_blocks
from .lib.dot import INTERPRETED
from .lib.log_sum_exp import log_sum_exp
from .lib.merge_pieces import merge_pieces
from .lib.pages import Pages
from .lib.round_rows import rounded as rounded_rows
from .lib.select_tiles import select_tiles
from .lib.soft_cap import factors
from .lib.tuning import run_tuned, size_class


@dataclass(frozen=True)
class Config:
    """Sizes of the selection kernel."""

    block_m: int  # queries of a tile; 32 per warp puts each query into one thread
    block_n: int  # keys of a tile
    capacity: int  # candidates of a query; at least budget + slack + block_n
    slack: int  # a cut may leave so many more than the budget, which saves rounds
    cut_elements: int  # candidates whose keys are in registers together while rows are cut
    num_warps: int
    num_stages: int
    programs_per_processor: int
    max_registers: int | None = None  # of a thread, for NVIDIA's compiler


FEW_QUERIES = 64  # a decoding step, a draft of a few tokens: nothing fills tiles of 128
LARGEST_WINDOW = 2**31 - 1  # no sequence is longer
SCRATCH_BYTES = 1 << 30  # of candidates: fewer programs where the budget is a large part of a long context

# Layouts are converted with shuffles there, which holds more registers: smaller tiles keep them from being spilled.
SHUFFLES = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


def configs(
    element_size: int,
    head_dim: int,
    budget: int,
    amd: bool,
    heavy: bool,  # a mask and shared selections need registers too, and few queries no large tile
    rows: int,  # that a tile has at most: where they are few, keys are read as fast as memory gives them
) -> list[Config]:
    """By the shape class: the first, and others that may be faster (fewer keys or queries, or more warps at once)."""
    wide = triton.next_power_of_2(head_dim) * element_size  # bytes of a row
    capacity = triton.next_power_of_2(budget + max(budget // 2, 128))
    if INTERPRETED:  # few and large steps; nothing has to fit anywhere
        return [Config(32, 32, capacity, budget // 8, 32 * capacity, 1, 1, 1)]
    floats = element_size == 4
    wide_floats = floats and wide >= 512
    many = capacity >= 4096 and wide < 512 and not (amd or SHUFFLES)
    per_thread = 16 if wide_floats else 64 if many else 32

    def sized(block_m: int, block_n: int, num_warps: int) -> Config:
        return Config(
            block_m=block_m,
            block_n=block_n,
            capacity=capacity,
            slack=budget // 8,
            cut_elements=num_warps * (64 if amd else 32) * per_thread,
            num_warps=num_warps,
            num_stages=1 if floats else 2 if amd or wide >= 512 else 3,
            # A cut is a chain of sums over all threads of a program: a second one fills its pauses.
            programs_per_processor=2 if (capacity <= 1024 or not amd) and num_warps <= 4 else 1,
            # No more than two programs are launched per multiprocessor, and left to itself the compiler spills to make
            # room for three.
            max_registers=None if wide_floats or amd else 255,
        )

    few = max(16, triton.next_power_of_2(rows))
    if capacity >= 4096:  # scratch memory grows with capacity · block_m
        block_m = min(few, 32 if capacity <= 8192 else 16)
        return [sized(block_m, 16 if wide_floats else 32, 2 if amd else 4)]
    if few <= 32 and not wide_floats:
        block_n = 32 if amd or floats or wide >= 512 else 64
        return [sized(few, block_n, 2 if amd else 4), sized(few, block_n // 2, 2)]
    if amd:  # with 64 KiB of shared memory
        block_n = 16 if wide_floats else 32
        return [sized(64, block_n, 2), sized(64, block_n, 4), sized(32, block_n, 2)]
    if floats:  # no tensor core multiplies float32 exactly: its tiles are made of registers
        some = [sized(32, 16, 4), sized(32, 32, 4), sized(64, 16, 8)]
        some[1] = replace(some[1], cut_elements=some[1].cut_elements // 2)  # or registers are spilled
        return some if wide_floats or SHUFFLES else [some[1], some[0], some[2]]
    if wide >= 512:  # of rows so long no more keys at a time fit beside the candidates that are cut
        return [sized(64, 16, 4), sized(64, 32, 8)]
    if SHUFFLES and (heavy or element_size == 1):
        return [sized(64, 16, 4), sized(32, 32, 4), sized(64, 32, 8)]
    some = [sized(128, 32, 4), sized(64, 32, 4), sized(128, 16, 4), sized(128, 32, 8)]
    return [some[1], some[0], *some[2:]] if heavy or SHUFFLES else some


@lru_cache
def _processors(device: torch.device) -> int:
    """Of the device; a few in the interpreter, where programs run one after the other."""
    if device.type == "cpu":
        return 2
    properties = getattr(torch, device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def _programs(processors: int, c: Config) -> int:
    """How many are launched at most: what the device holds at once, and the scratch memory allows."""
    of_one = 8 * c.block_m * (c.capacity + c.block_n)
    return min(processors * c.programs_per_processor, max(1, SCRATCH_BYTES // of_one))


def _splits(tiles: int, programs: int, key_length: int, budget: int, block_n: int) -> tuple[int, int]:
    """(number of pieces of the keys, keys of a piece): more than one where the queries alone fill no device."""
    # A piece shorter than a few budgets would only copy its keys into the merge.
    pieces = min(programs // tiles, key_length // max(4 * budget, 16 * block_n), max(1, 8192 // budget))
    if pieces < 2:
        return 1, triton.cdiv(key_length, block_n) * block_n
    length = triton.cdiv(triton.cdiv(key_length, pieces), block_n) * block_n
    return triton.cdiv(key_length, length), length


class Among(NamedTuple):
    """Blocks of keys, one row of them for each tile of queries: the only keys that may be chosen."""

    blocks: Tensor  # int32 [B, G, N, M]
    block_size: int
    query_tile: int


class Indexed(NamedTuple):
    """The keys as an index has them, in whose highest possible scores they are ranked (lib/key_bounds.py)."""

    bounds: Tensor  # float32 [B, Hkv, N, 3, 16], contiguous
    margins: Tensor  # float32 [B, Hq, Tq, 4]
    length: int  # Tk


def topk_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    rounded: bool,  # scores of queries and keys that are rounded to 8 bits
    blocks: Tensor | None,  # int32 [B, G, N, M]: the keys of these blocks alone
    block_size: int,
    query_tile: int,
) -> Tensor:  # int32 [B, G, Tq, K]
    among = None if blocks is None else Among(blocks, block_size, query_tile)
    return select(query, key, top_k, rule, rounded=rounded, among=among)[0]


def select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    with_scores: bool = False,
    *,
    rounded: bool = False,
    among: Among | None = None,
    weights: Tensor | None = None,  # float32 [B, Hq, Tq]: of an indexer's heads
    pages: Pages
    | None = None,  # key is [P, Hkv, page size, D] then, B is 1, and the rule's Tk that of all pages
    indexed: Indexed
    | None = None,  # query is int8 then, with its sign, and key int8 [B, Hkv, N, words, 16, 4]
    redo: tuple[Tensor, Tensor, Tensor | None]
    | None = None,  # int32 [B, Hq, Tq]: rows that indices and scores lack
) -> tuple[Tensor, Tensor | None]:  # indices int32 [B, G, Tq, K], scores float32 [B, G, Tq, K]
    """The selection and, if wanted, what ranked each key: sign(scale) · q·k, or its mass; −inf in an empty slot."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1], key.shape[2] if pages is None else pages.keys
    if indexed is not None:
        key_length = indexed.length
    budget = min(top_k, key_length)
    groups, is_causal, scale = rule.groups, rule.is_causal, rule.scale
    shape = (batch, groups, query_length, budget)
    indices = query.new_empty(shape, dtype=torch.int32) if redo is None else redo[1]
    scores = query.new_empty(shape, dtype=torch.float32) if with_scores else None
    missing = None
    if redo is not None:
        missing, _, scores = redo
    if indices.numel() == 0:
        return indices, scores
    query_scale = key_scale = None
    key_strides = key.stride()
    if indexed is not None:
        key_scale, query_scale = indexed.bounds, indexed.margins
        key_strides = (*key.stride()[:2], key_scale.stride(1), key.shape[3])
    if rounded:
        (query, query_scale), (key, key_scale) = rounded_rows(query), rounded_rows(key)
        key_strides = key.stride()
    if weights is not None:
        weights = (weights if query_scale is None else weights * query_scale).contiguous()
        query_scale = None
    sharing, repeat = heads // groups, heads // kv_heads
    by_mass = sharing > 1 and weights is None
    sequences = 1 if pages is None else max(1, key_length // max(1, pages.room))
    mean_length = triton.cdiv(query_length, sequences)  # queries of a sequence
    # Heads of a key head may be in one tile, where the queries alone leave it empty.
    rows = mean_length * repeat if sharing == 1 and weights is None else mean_length
    together = rows > mean_length and rows <= FEW_QUERIES
    words, count, block_size, query_tile, query_tiles = None, 0, 1, 1, 0
    if among is not None:
        # Larger blocks and tiles than the sequences change nothing.
        block_size, query_tile = min(among.block_size, key_length), min(among.query_tile, query_length)
        count, query_tiles = triton.cdiv(key_length, block_size), among.blocks.shape[2]
        words = words_of_blocks(among.blocks, count)
    # Positions beyond every key are all alike; like this their sums stay within 32 bits.
    window_offset = min(max(rule.causal_offset - rule.window, -query_length - 1), key_length)
    causal_offset = min(max(rule.causal_offset, -query_length), key_length)
    if rule.causal_offsets is not None:
        window_offset = -min(rule.window, LARGEST_WINDOW)
    first_kept = rule.first_kept(key_length)
    mask = None if rule.attn_mask is None else rule.attn_mask.view(torch.uint8)
    key_lengths, starts, offsets = rule.key_lengths, rule.key_starts, rule.causal_offsets
    if pages is not None and starts is None:
        starts = query.new_zeros((1, query_length), dtype=torch.int32)
    of_queries_strides = tuple(n for t in (starts, offsets) for n in ((0, 0) if t is None else t.stride()))
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    block_d = max(
        32 if rounded or indexed is not None else 16, triton.next_power_of_2(head_dim)
    )  # what a tensor core takes at least
    # A head's own selection is by the uncapped q·k.
    scoring = factors(scale, rule.softcap if sharing > 1 else 0.0, 1.0)
    amd = torch.version.hip is not None

    def launch(c: Config) -> None:
        packed = _packed(repeat, c.block_m) if together else 1
        # The loop at the edges of causal attention is short, but has all keys where there is no other.
        all_edges = mask is not None or words is not None or pages is not None or packed > 1
        blocks, busy = _query_blocks(query_length, c.block_m // packed, pages, sequences)
        of_query = batch * (groups // packed)
        tiles = of_query * blocks
        held = _programs(_processors(query.device), c)
        longest = key_length if pages is None else pages.room
        splits, split_length = _splits(of_query * busy, held, longest, budget, c.block_n)
        programs = min(held, tiles * splits)
        found = indices if splits == 1 else query.new_empty((*shape[:3], splits, budget), dtype=torch.int64)
        slots = query.new_empty((programs, c.block_m, c.capacity + c.block_n), dtype=torch.int64)
        counts = query.new_empty((programs, c.block_m), dtype=torch.int32)
        thresholds = query.new_empty((programs, c.block_m), dtype=torch.float32)
        queue = query.new_zeros(1, dtype=torch.int32)
        cut = _cut_shape(c, c.block_m, c.capacity)
        limit = {"maxnreg": c.max_registers} if query.device.type == "cuda" and not amd else {}
        per_head = weights
        of_pages = (None, 0, 1) if pages is None else (pages.table, pages.count, pages.size)
        of_blocks = of_pages[1], block_size, count, query_tile, query_tiles
        if by_mass:
            same = _packed(min(sharing, repeat), c.block_m)
            blocks_of_lse, busy = _query_blocks(query_length, c.block_m // same, pages, sequences)
            of_heads = batch * (heads // same)
            parts = max(1, min(held // (of_heads * busy), longest // (16 * c.block_n)))
            lse = query.new_empty((parts, batch, heads, query_length), dtype=torch.float32)
            log_sum_exp[(of_heads * blocks_of_lse, parts)](
                query, key, mask, key_lengths, starts, offsets, of_pages[0], words, key_scale, query_scale,
                rule.sink_logits, lse, *query.stride(), *key_strides, *mask_strides, *of_queries_strides, heads,
                query_length, key_length, head_dim, causal_offset, window_offset, first_kept, *scoring, blocks_of_lse,
                parts, *of_blocks, of_pages[2], is_causal, sharing, repeat, same, c.block_m, c.block_n, block_d,
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
            per_head = lse[0]
            if parts > 1:
                per_head = lse.logsumexp(0)
                per_head.masked_fill_(per_head == -torch.inf, torch.inf)
        select_tiles[(programs,)](
            query, key, mask, key_lengths, starts, offsets, of_pages[0], words, key_scale, query_scale, per_head,
            missing, slots, counts, thresholds, queue, found,
            scores if splits == 1 else None, *query.stride(), *key_strides, *mask_strides, *of_queries_strides,
            groups // packed, query_length, key_length, head_dim, budget, c.slack, causal_offset, window_offset,
            first_kept, *scoring, tiles * splits, blocks, splits, split_length, *of_blocks,
            indexed is not None, weights is not None,
            1 if sharing > 1 or weights is not None or indexed is not None else (scale > 0) - (scale < 0),
            is_causal, sharing, repeat, splits > 1, packed, of_pages[2],
            c.block_m, c.block_n, block_d, c.capacity, *cut, c.num_stages if all_edges else 1,
            num_warps=c.num_warps, num_stages=c.num_stages, **limit,
        )  # fmt: skip
        if splits > 1:
            rows, width = batch * groups * query_length, splits * budget
            capacity = triton.next_power_of_2(width)
            cut = _cut_shape(c, 32, capacity)
            merge_pieces[(triton.cdiv(rows, cut[0]),)](
                found, indices, scores, missing, starts, offsets, *of_queries_strides, rows, groups, query_length,
                key_length, width, budget, window_offset, first_kept,
                is_causal, capacity, *cut, num_warps=c.num_warps,
            )  # fmt: skip

    with _device_of(query):
        run_tuned(
            "topk_select",
            (
                *(query.dtype, head_dim, sharing, is_causal, mask is not None or starts is not None),
                *(among is not None, weights is not None, indexed is not None, together),
                0 if pages is None else pages.size,
                *(size_class(budget), size_class(key_length), size_class(batch * groups * query_length)),
            ),
            configs(
                query.element_size(),
                head_dim,
                budget,
                amd,
                sharing > 1 or mask is not None or among is not None or mean_length <= FEW_QUERIES,
                rows if together else mean_length,
            ),
            launch,
            query.device,
        )
    return indices, scores


def _packed(heads: int, rows: int) -> int:
    """How many of the heads that have a key head in common are in a tile of so many rows."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= rows)


def _query_blocks(query_length: int, per_tile: int, pages: Pages | None, sequences: int) -> tuple[int, int]:
    """(tiles of queries, how many of them have something to do)."""
    full = triton.cdiv(query_length, per_tile)
    return (full, full) if pages is None else (query_length, min(query_length, full + sequences))


def _cut_shape(c: Config, rows: int, capacity: int) -> tuple[int, int, int]:
    """(ROWS, CHUNK, STEP) of find_cut and what follows it, for rows of this capacity."""
    together = max(1, min(rows, c.cut_elements // capacity))
    chunk = max(1, c.cut_elements // together)
    return together, chunk, min(capacity, max(16, c.cut_elements // 4 // together))


def _device_of(tensor: Tensor):
    """Triton launches on the current device."""
    return (
        nullcontext()
        if tensor.device.type == "cpu"
        else getattr(torch, tensor.device.type).device(tensor.device)
    )
