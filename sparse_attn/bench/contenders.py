"""What a user would write or call instead of the attention ops, as functions of (query, key, value)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.bench.attention_case import AttentionCase

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(case: AttentionCase) -> Forward:
    """Dense attention; where fewer queries than keys are causal, with the mask that puts them last."""
    options = {"enable_gqa": case.heads != case.kv_heads}
    if case.sees_all or case.queries == case.length:
        options["is_causal"] = not case.sees_all
    else:
        options["attn_mask"] = ~hidden(case.queries, case.length)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)


def sdpa_rows(case: AttentionCase) -> Forward:
    """Dense attention of one query, the heads that share a key head as its rows: each key is read once."""
    shape = (case.kv_heads, case.heads // case.kv_heads)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.unflatten(1, shape).flatten(2, 3)  # [B, Hkv, R, D]
        return F.scaled_dot_product_attention(rows, key, value).flatten(1, 2).unsqueeze(2)

    return forward


@lru_cache(maxsize=4)
def hidden(queries: int, keys: int, device: str = "cpu") -> Tensor:
    """bool [Tq, Tk], True where a causal query, one of the last, does not see; made once, as models keep a buffer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1 + keys - queries)


# ---- FlexAttention: dense causal attention, for top-k per token would need a [T, T] mask -----------------


def compiled_flex() -> Callable:
    """A kernel of its own for each case: past a handful of shapes torch.compile gives up and runs eagerly."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def causal_blocks(queries: int, keys: int, device: str = "cpu"):
    from torch.nn.attention.flex_attention import create_block_mask

    offset = keys - queries
    return create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, queries, keys, device=device)


@lru_cache(maxsize=1)
def flex_problem() -> str | None:
    """Whatever stops it here: no C++ compiler, an unsupported CPU, …"""
    try:
        query = torch.randn(1, 1, 128, 64)
        compiled_flex()(query, query, query, block_mask=causal_blocks(128, 128))
    except Exception as error:
        first = str(error).strip().splitlines()[0][:120]
        return f"FlexAttention did not compile here ({type(error).__name__}: {first})"
    return None


def flex(case: AttentionCase) -> Forward:
    blocks = None if case.sees_all else causal_blocks(case.queries, case.length)
    run, gqa = compiled_flex(), case.heads != case.kv_heads
    return lambda query, key, value: run(query, key, value, block_mask=blocks, enable_gqa=gqa)


# ---- plain PyTorch --------------------------------------------------------------------------------------


def _plain_select(case: AttentionCase, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and the positions of the best keys, as one writes it: [B, H, Tq, K] each."""
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5  # [B, H, Tq, Tk]
    if not case.sees_all:
        scores = scores.masked_fill(hidden(query.shape[2], key.shape[2]), -torch.inf)
    return scores.topk(min(case.top_k, key.shape[2]), dim=-1)


def _tuned_select(case: AttentionCase, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the scale folded into the queries, the mask applied in place and no sorting."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if not case.sees_all:
        scores.masked_fill_(hidden(query.shape[2], key.shape[2]), -torch.inf)
    return scores.topk(min(case.top_k, key.shape[2]), dim=-1, sorted=False)


SELECTIONS = {"plain": _plain_select, "plain_tuned": _tuned_select}


def _gather(rows: Tensor, indices: Tensor) -> Tensor:
    """[B, H, Tk, D] at [B, H, Tq, K] → [B, H, Tq, K, D] by torch.gather."""
    queries, width = indices.shape[2], rows.shape[3]
    spread = rows.unsqueeze(2).expand(-1, -1, queries, -1, -1)
    return spread.gather(3, indices.unsqueeze(-1).expand(-1, -1, -1, -1, width))


def _index_select(rows: Tensor, indices: Tensor) -> Tensor:
    """The same by index_select on flat rows, the quickest gather of plain PyTorch here."""
    batch, heads, length, width = rows.shape
    base = torch.arange(batch * heads).view(batch, heads, 1, 1) * length
    return rows.flatten(0, 2).index_select(0, (indices + base).flatten()).view(*indices.shape, width)


GATHERS = {"plain": _gather, "plain_tuned": _index_select}


def _widened(case: AttentionCase, key: Tensor) -> Tensor:
    """A key head per query head."""
    shared = case.heads // case.kv_heads
    return key if shared == 1 else key.repeat_interleave(shared, dim=1)


def _refuse_options(name: str, case: AttentionCase) -> None:
    if case.window or case.sinks or case.share != "none":
        raise ValueError(f"{name} has no windows, sinks or shared selections, got {case}")


def plain_indices(name: str, case: AttentionCase, query: Tensor, key: Tensor) -> Tensor:
    """int64 [B, Hq, Tq, K]: what plain PyTorch selects; hidden keys fill up the rows that see fewer."""
    _refuse_options(name, case)
    return SELECTIONS[name](case, query, _widened(case, key))[1]


def plain_topk(name: str, case: AttentionCase) -> Forward:
    """Select, gather and attend."""
    _refuse_options(name, case)
    choose, gather = SELECTIONS[name], GATHERS[name]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        best, indices = choose(case, query, _widened(case, key))
        weights = best.softmax(-1)  # a slot past the causal edge holds −inf and weighs nothing
        return (weights.unsqueeze(-2) @ gather(_widened(case, value), indices)).squeeze(-2)

    return attend


def plain_gathered(name: str, case: AttentionCase, given: Tensor) -> Forward:
    """Attention to given indices, int [B, Hq, Tq, K]."""
    gather, empty, indices = GATHERS[name], given < 0, given.clamp(min=0).to(torch.int64)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = _widened(case, key), _widened(case, value)
        scores = (gather(key, indices) @ query.unsqueeze(-1)).squeeze(-1) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(empty, -torch.inf).softmax(-1)
        return (weights.unsqueeze(-2) @ gather(value, indices)).squeeze(-2)

    return attend
