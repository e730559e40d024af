"""`topk_attention`, forward: the selection, then a softmax over the scores that it has computed already.

Where every head has its own selection, `topk_select` hands over the score beside each index (4 bytes beside the
4 of the index), so only values are gathered, half of what the staged pair moves. The floor is that gather: K · Dv
elements per query and head from the second-level cache (T = 16k, 16 heads, Dv = 128, bf16, K = 64: 4.3 GB, 0.8 ms
at 5.5 TB/s; it grows with K and passes a dense attention at about K = 256, from where a second dense pass that
masks by threshold would win: not built). Where heads share a selection their ranks are no scores, and what follows
the selection is `gathered_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.rule import PackedRule

from .gathered_attention import gathered_attention
from .lib.common import LN2, LOG2_OF_E, LOG2E, grid_of, outer_program, rounded
from .lib.rows import gather_rows, load_rows
from .lib.soft_cap import capped, factors
from .lib.tuning import run_tuned, size_class
from .topk_select import select

# Up to this budget one program holds a row of scores.
LARGEST_BUDGET = 4096


@triton.jit(do_not_specialize=["outer_size", "query_length", "key_length"])
def _weigh_values(
    value,  # [B, Hkv, Tk, Dv]
    indices,  # int32 [B, Hq, Tq, K], contiguous
    scores,  # float32 [B, Hq, Tq, K], contiguous: sign(scale) · q·k, −inf in empty slots
    sink_logits,  # float32 [Hq], contiguous, or None
    out,  # [B, Hq, Tq, Dv], contiguous
    lse,  # float32 [B, Hq, Tq], contiguous
    value_b,
    value_h,
    value_t,
    value_d,
    outer_size,  # B · Hq
    heads,
    repeat,  # query heads of one key head
    query_length,
    key_length,
    budget,
    factor,  # |scale| · log2 e; with a cap |scale| / softcap
    bound,  # softcap · log2 e, or None
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_BUDGET: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    outer = outer_program()
    if outer < outer_size:
        row = outer.to(tl.int64) * query_length + tl.program_id(0)
        batch = (outer // heads).to(tl.int64)
        values = value + batch * value_b + (outer % heads // repeat).to(tl.int64) * value_h
        indices += row * budget
        scores += row * budget
        slot = tl.arange(0, BLOCK_BUDGET)
        exponent = capped(tl.load(scores + slot, mask=slot < budget, other=float("-inf")) * factor, bound)
        # −inf times a scale of 0 is NaN, and an empty slot is one whatever the scale.
        filled = tl.load(indices + slot, mask=slot < budget, other=-1) >= 0
        exponent = tl.where(filled, exponent, float("-inf"))
        top = tl.max(exponent, 0)
        if sink_logits is not None:
            sink = tl.load(sink_logits + outer % heads) * LOG2_OF_E
            top = tl.maximum(top, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(exponent - base), 0)
        if sink_logits is not None:
            total += tl.exp2(sink - base)

        mean = tl.zeros([BLOCK_K, BLOCK_VALUE], tl.float32)
        for start in range(0, budget, BLOCK_K):
            chunk = start + tl.arange(0, BLOCK_K)
            key_row, valid = gather_rows(indices, start, 1, budget, key_length, BLOCK_K)
            weight = capped(tl.load(scores + chunk, mask=valid, other=float("-inf")) * factor, bound)
            weight = tl.where(valid, tl.exp2(weight - base), 0.0)
            rows = load_rows(values, key_row, valid, value_t, value_d, VALUE_DIM, BLOCK_VALUE)
            mean += weight[:, None] * rows.to(tl.float32)
        # A row that attends to nothing has total 0 and sums of 0. NaN is no 0.
        result = tl.sum(mean, 0) / tl.where(total == 0.0, 1.0, total)
        column = tl.arange(0, BLOCK_VALUE)
        tl.store(
            out + row * VALUE_DIM + column, rounded(result, out.dtype.element_ty), mask=column < VALUE_DIM
        )
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), (base + tl.log2(total)) * LN2))


def value_configs(value_dim: int) -> list[dict[str, int]]:
    """Block sizes of `_weigh_values`: elements in flight per program, 32 per thread in the first."""
    block_value = max(16, triton.next_power_of_2(value_dim))
    return [
        {"BLOCK_VALUE": block_value, "BLOCK_K": max(1, elements // block_value), "num_warps": warps}
        for elements, warps in ((4096, 4), (2048, 4), (2048, 2), (8192, 8))
    ]


def topk_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq], int32 [B, G, Tq, K]
    fused = rule.groups == query.shape[1] and min(top_k, key.shape[2]) <= LARGEST_BUDGET
    indices, scores = select(query, key, top_k, rule, fused)
    if not fused:
        scoring = rule.scale, rule.softcap, rule.sink_logits
        return *gathered_attention(query, key, value, indices, *scoring), indices
    return *weigh_values(value, indices, scores, rule, query.dtype), indices


def weigh_values(
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, Hq, Tq, K]
    scores: Tensor,  # float32 [B, Hq, Tq, K], sign(scale) · q·k
    rule: PackedRule,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    batch, heads, query_length, budget = indices.shape
    kv_heads, key_length, value_dim = value.shape[1:]
    out = value.new_empty((batch, heads, query_length, value_dim), dtype=dtype)
    lse = value.new_empty((batch, heads, query_length), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    grid = grid_of(query_length, batch * heads)
    run_tuned(
        "topk_attention values",
        (value.dtype, value_dim, size_class(budget), size_class(query_length * batch * heads)),
        value_configs(value_dim),
        lambda config: _weigh_values[grid](
            value, indices, scores, rule.sink_logits, out, lse, *value.stride(), batch * heads, heads,
            heads // kv_heads, query_length, key_length, budget, *factors(abs(rule.scale), rule.softcap, LOG2E),
            VALUE_DIM=value_dim, BLOCK_BUDGET=max(16, triton.next_power_of_2(budget)), **config,
        ),
        value.device,
    )  # fmt: skip
    return out, lse
