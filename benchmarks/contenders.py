"""Who is compared: ours, and what a user would write or call instead.

A contender is made for one case and one set of tensors: `prepare(name, case, tensors)` returns its forward as
a function of (query, key, value). All get the same tensors; masks and indices are made before the clock runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks.cases import Case

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

LABELS = {
    "ours": "sparse_attn",
    "sdpa": "SDPA (dense)",
    "flex": "FlexAttention (dense)",
    "plain": "plain PyTorch",
    "plain_tuned": "plain PyTorch, tuned",
    "scores": "scores alone (matmul)",
}
# The plain rivals store [H, T, T] scores (and their gradients): past these lengths they are not run.
PLAIN_MAX_LENGTH = 4096


def why_not(name: str, case: Case) -> str | None:
    """None if the contender can run the case, else the reason in one clause."""
    if name.startswith("plain") and case.length > PLAIN_MAX_LENGTH:
        return f"its [H, T, T] scores take {8 * case.length**2 * 4 / 1e9:.1f} GB at T={case.length}"
    if name == "plain" and case.backward and case.length > 1024:
        return "the backward of its torch.gather takes half a minute a call past T=1024"
    if name == "flex":
        return "FlexAttention has no backward on the CPU" if case.backward else _flex_problem()
    return None


def prepare(name: str, case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Forward:
    """The contender's forward for this case."""
    if name == "ours":
        return _ours(case, tensors)
    if name == "sdpa":
        return _sdpa(case)
    if name == "flex":
        return _flex(case)
    return _plain(name, case, tensors)


def selection_arguments(case: Case) -> dict:
    """The arguments of topk_attention and topk_select that make this case; the queries are the last ones."""
    offset = {} if case.query_length is None else {"causal_offset": case.length - case.query_length}
    window = {"window": case.window, "sinks": case.sinks, "share": case.share}
    return {"is_causal": True, **offset, **window}


def select(case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The indices that `gathered_attention` is given, and that a correct `topk_attention` must choose."""
    with torch.no_grad():
        return sparse_attn.topk_select(*tensors[:2], case.top_k, **selection_arguments(case))


def _ours(case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Forward:
    arguments = selection_arguments(case)
    if case.op == "topk_select":
        return lambda query, key, value: sparse_attn.topk_select(query, key, case.top_k, **arguments)
    if case.op == "topk_attention":
        return lambda query, key, value: sparse_attn.topk_attention(
            query, key, value, case.top_k, **arguments
        )
    indices = select(case, tensors)
    return lambda query, key, value: sparse_attn.gathered_attention(query, key, value, indices)


def _sdpa(case: Case) -> Forward:
    gqa = case.heads != case.kv_heads
    if case.query_length not in (None, 1):
        raise ValueError("SDPA is compared with as many queries as keys, or with the last query alone")
    causal = case.query_length is None  # the last query sees every key
    return lambda query, key, value: F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=gqa
    )


# ---- FlexAttention: dense causal attention, for top-k per token would need a [T, T] mask -----------------


def _compiled_flex() -> Callable:
    """A kernel of its own for each case: past a handful of shapes torch.compile gives up and runs eagerly."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _causal_blocks(length: int):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")


@lru_cache(maxsize=1)
def _flex_problem() -> str | None:
    try:
        query = torch.randn(1, 1, 128, 64)
        _compiled_flex()(query, query, query, block_mask=_causal_blocks(128))
    except Exception as error:  # no C++ compiler, an unsupported CPU, …: whatever stops it is the reason
        return (
            f"FlexAttention did not compile here ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        )
    return None


def _flex(case: Case) -> Forward:
    blocks, gqa = _causal_blocks(case.length), case.heads != case.kv_heads
    flex = _compiled_flex()
    return lambda query, key, value: flex(query, key, value, block_mask=blocks, enable_gqa=gqa)


# ---- plain PyTorch --------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _hidden(length: int) -> Tensor:
    """bool [T, T], True above the diagonal; made once, as models keep it in a buffer."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _plain_select(query: Tensor, key: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The scores and the positions of the best keys, as one writes it: [B, H, T, K] each."""
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5  # [B, H, T, T]
    scores = scores.masked_fill(_hidden(key.shape[2]), -torch.inf)
    return scores.topk(min(top_k, key.shape[2]), dim=-1)


def _tuned_select(query: Tensor, key: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The same with the scale folded into the queries, the mask applied in place and no sorting."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores.masked_fill_(_hidden(key.shape[2]), -torch.inf)
    return scores.topk(min(top_k, key.shape[2]), dim=-1, sorted=False)


PLAIN_SELECTIONS = {"plain": _plain_select, "plain_tuned": _tuned_select}


def _gather(rows: Tensor, indices: Tensor) -> Tensor:
    """[B, H, T, D] at [B, H, T, K] → [B, H, T, K, D] by torch.gather."""
    length, width = indices.shape[2], rows.shape[3]
    spread = rows.unsqueeze(2).expand(-1, -1, length, -1, -1)
    return spread.gather(3, indices.unsqueeze(-1).expand(-1, -1, -1, -1, width))


def _index_select(rows: Tensor, indices: Tensor) -> Tensor:
    """The same by index_select on flat rows, the quickest gather of plain PyTorch here."""
    batch, heads, length, width = rows.shape
    base = torch.arange(batch * heads).view(batch, heads, 1, 1) * length
    return rows.flatten(0, 2).index_select(0, (indices + base).flatten()).view(*indices.shape, width)


def _plain(name: str, case: Case, tensors: tuple[Tensor, Tensor, Tensor]) -> Forward:
    if case.heads != case.kv_heads or case.query_length is not None or case.window or case.sinks:
        raise ValueError(f"{name} is compared in the plain setting only, got {case}")
    if name == "scores":
        return lambda query, key, value: query @ key.transpose(-1, -2)
    choose, gather = PLAIN_SELECTIONS[name], _index_select if name == "plain_tuned" else _gather
    if case.op == "topk_select":
        return lambda query, key, value: choose(query, key, case.top_k)[1]
    if case.op == "topk_attention":

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            best, indices = choose(query, key, case.top_k)
            weights = best.softmax(-1)  # a slot past the causal edge holds −inf and weighs nothing
            return (weights.unsqueeze(-2) @ gather(value, indices)).squeeze(-2)

        return attend
    indices = select(case, tensors)
    empty, indices = indices < 0, indices.clamp(min=0).to(torch.int64)

    def attend_given(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (gather(key, indices) @ query.unsqueeze(-1)).squeeze(-1) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(empty, -torch.inf).softmax(-1)
        return (weights.unsqueeze(-2) @ gather(value, indices)).squeeze(-2)

    return attend_given
