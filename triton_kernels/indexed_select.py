"""`indexed_select`: the selection of `topk_select`, to the bit, from 8-bit rows of a key index and a few of the keys.

Three steps. Keys are ranked by the highest score that the index leaves possible (lib/key_bounds.py) in the kernel that
ranks them by their scores elsewhere: split over programs, the best of all parts merged. Of these a few times the budget
are scored from the keys themselves, by the product that a tile makes of them, and the best of them written with a proof
that no other key can be among them. Rows without a proof are selected as without an index: that kernel is launched too,
and its tiles return at once where every row has one, which only the device knows.

Floor: D + 12 bytes a key, and D elements of each of the candidates. 128k keys, 8 key heads, D = 128 are 147 MB, 0.05 ms
at 3.35 TB/s, where bfloat16 keys are 268 MB and float32 ones 537.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.key_bounds import round_queries, settle
from .topk_select import FEW_QUERIES, LARGEST_WINDOW, Indexed, _cut_shape, configs, select


def indexed_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
) -> Tensor:  # int32 [B, G, Tq, K]
    return select_indexed(query, key, top_k, rule, codes, bounds, shift)[0]


def candidates_of(budget: int) -> int:
    """How many keys are scored for so many that are wanted: on models' keys the worst of a hundred rows needs 2.5 times
    as many."""
    return 2 * budget + 64


def select_indexed(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `select` of topk_select.py gives."""
    batch, heads, query_length, dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    budget = min(top_k, key_length)
    width, sign = candidates_of(budget), (rule.scale > 0) - (rule.scale < 0)
    shares, few = rule.groups < heads, query_length * (heads // max(1, kv_heads)) <= FEW_QUERIES
    # Where most keys would be scored anyway, or heads share, or all scores are ties, it says nothing.
    if shares or not few or sign == 0 or 2 * width > key_length or query.numel() == 0 or budget == 0:
        return select(query, key, top_k, rule, with_scores)
    rows, pitch = batch * heads * query_length, triton.cdiv(dim, 16) * 16
    whole = query.new_empty((batch, heads, query_length, pitch), dtype=torch.int8)
    margins = query.new_empty((batch, heads, query_length, 4), dtype=torch.float32)
    ceilings = query.new_empty((batch, heads, query_length), dtype=torch.float32)
    block_d = triton.next_power_of_2(pitch)
    round_queries[(rows,)](
        whole, margins, ceilings, query, shift.contiguous(), *query.stride(), heads, kv_heads, query_length, SIGN=sign,
        DIM=dim, PITCH=pitch, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip
    indexed = Indexed(bounds.contiguous(), margins, key_length)
    found, highest = select(whole[..., :dim], codes.contiguous(), width, rule, True, indexed=indexed)

    indices = query.new_empty((batch, heads, query_length, budget), dtype=torch.int32)
    scores = query.new_empty(indices.shape, dtype=torch.float32) if with_scores else None
    slots = query.new_empty((rows, width), dtype=torch.int64)
    redo = query.new_empty((batch, heads, query_length), dtype=torch.int32)
    # As wide as the tiles of `select`, so that products have the same bits.
    repeat = heads // kv_heads
    c = configs(
        query.element_size(), dim, budget, torch.version.hip is not None, True, query_length * repeat
    )[0]
    capacity = triton.next_power_of_2(width)
    window_offset = min(max(rule.causal_offset - rule.window, -query_length - 1), key_length)
    if rule.causal_offsets is not None:
        window_offset = -min(rule.window, LARGEST_WINDOW)
    of_queries = tuple(
        n for t in (rule.key_starts, rule.causal_offsets) for n in ((0, 0) if t is None else t.stride())
    )
    settle[(rows,)](
        query, key, found, highest, ceilings, rule.key_starts, rule.causal_offsets, slots, indices, scores, redo,
        *query.stride(), *key.stride(), *of_queries, heads, query_length, key_length, dim, width, budget, window_offset,
        rule.first_kept(key_length), SIGN=sign, IS_CAUSAL=rule.is_causal, REPEAT=repeat, BLOCK_M=c.block_m,
        BLOCK_N=c.block_n, BLOCK_D=max(16, triton.next_power_of_2(dim)), CAPACITY=capacity,
        **dict(zip(("CHUNK", "STEP"), _cut_shape(c, 1, capacity)[1:], strict=True)), num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    return select(query, key, top_k, rule, with_scores, redo=(redo, indices, scores))
