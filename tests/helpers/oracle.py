"""The three ops once more, in float64, dense and slow: what the tests believe.

Written from the documentation, not from any wing, and with other means: full matrices, Python sorting and
autograd. Nothing here is fast and nothing needs to be.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def scores(query: Tensor, key: Tensor, scale: float | None = None, softcap: float | None = None) -> Tensor:
    """scale · q·k as float64 [B, Hq, Tq, Tk], with a cap softcap · tanh(scale · q·k / softcap)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    each = torch.einsum("bhid,bhjd->bhij", query.double(), key) * scale
    return each if softcap is None else softcap * torch.tanh(each / softcap)


def visible(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    causal_offset: int | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    **_others,
) -> Tensor:
    """Which keys each query may attend to, bool [B, Hq, Tq, Tk]."""
    shape = (*query.shape[:3], key.shape[2])
    seen = torch.ones(shape, dtype=torch.bool)
    j = torch.arange(shape[3])
    if is_causal:
        seen &= j <= own_keys(query, causal_offset)
    if attn_mask is not None:
        seen &= attn_mask.expand(shape)
    if key_lengths is not None:
        seen &= j < key_lengths.view(-1, 1, 1, 1)
    return seen & (j >= first_keys(query, key_starts))


def first_keys(query: Tensor, key_starts: Tensor | None) -> Tensor:
    """Where each query's keys begin, int64 [B, 1, Tq, 1]."""
    batch, _, length, _ = query.shape
    if key_starts is None:
        return torch.zeros(batch, 1, length, 1, dtype=torch.int64)
    each = key_starts.view(batch, 1) if key_starts.dim() == 1 else key_starts
    return each.expand(batch, length).long().clamp(0, 2**40)[:, None, :, None]


def own_keys(query: Tensor, causal_offset: int | Tensor | None) -> Tensor:
    """The last key that each query sees where it is causal, int64 [B or 1, 1, Tq, 1]."""
    i = torch.arange(query.shape[2]).view(1, 1, -1, 1)
    if not isinstance(causal_offset, Tensor):
        return i + (causal_offset or 0)
    offset = causal_offset.long().clamp(-(2**40), 2**40)
    return i + (offset.view(-1, 1, 1, 1) if offset.dim() == 1 else offset[:, None, :, None])


def forced(
    query: Tensor,
    key: Tensor,
    *,
    causal_offset: int | Tensor | None = None,
    window: int = 0,
    sinks: int = 0,
    key_starts: Tensor | None = None,
    **_others,
) -> Tensor:
    """Which keys are kept whatever their score if they are visible, bool [B, 1, Tq, Tk]."""
    j, own = torch.arange(key.shape[2]), own_keys(query, causal_offset)
    return (j < first_keys(query, key_starts) + sinks) | ((j > own - window) & (j <= own))


def groups(query: Tensor, key: Tensor, share: str) -> int:
    return {"none": query.shape[1], "kv": key.shape[1], "all": 1}[share]


def ranks(
    query: Tensor, key: Tensor, *, scale=None, share: str = "none", softcap=None, sink_logits=None, **options
) -> Tensor:
    """What a key is chosen by, float64 [B, G, Tq, Tk]: its score, or its attention mass where heads share.

    A score alone is never capped: among equal keys of the cap's end the larger q·k is better.
    """
    count = groups(query, key, share)
    if count == query.shape[1]:
        return scores(query, key, scale)
    seen = visible(query, key, **options)
    each = scores(query, key, scale, softcap).masked_fill(~seen, -math.inf)
    each = torch.cat((each, sink_column(each, sink_logits)), dim=-1)
    probabilities = each.softmax(-1)[..., :-1].masked_fill(~seen, 0.0)
    return probabilities.unflatten(1, (count, -1)).sum(2)


def sink_column(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The logits of the sinks beside scores [B, Hq, Tq, Tk]: float64 [B, Hq, Tq, 1], −inf where there are none."""
    column = scores.new_full((scores.shape[1],), -math.inf) if sink_logits is None else sink_logits.double()
    return column.view(-1, 1, 1).expand(*scores.shape[:3], 1)


def topk_select(query: Tensor, key: Tensor, top_k: int, **options) -> Tensor:
    """int32 [B, G, Tq, K]: sort each row (visible, forced, larger rank, smaller index first) and cut it."""
    rank = ranks(query, key, **options)
    seen = first_of_group(visible(query, key, **options), rank.shape[1])
    return select(rank, seen, forced(query, key, **options), top_k)


def select(rank: Tensor, seen: Tensor, kept: Tensor, top_k: int) -> Tensor:
    """int32 [B, G, Tq, K] of rank and seen [B, G, Tq, Tk], kept likewise or broadcast."""
    rank, seen = rank.numpy(), seen.numpy()
    kept = np.broadcast_to(kept.numpy(), seen.shape)
    length = rank.shape[-1]
    position = np.broadcast_to(np.arange(length), seen.shape)
    is_nan = np.isnan(rank)
    # The last key of lexsort is its first criterion; False comes before True.
    order = np.lexsort((position, -np.where(is_nan, 0.0, rank), ~is_nan, ~kept, ~seen), axis=-1)[..., :top_k]
    chosen = np.sort(np.where(np.take_along_axis(seen, order, -1), order, length), axis=-1)
    return torch.from_numpy(np.where(chosen < length, chosen, -1).astype(np.int32))


def indexer_scores(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Σ_h w_h · max(0, q_h · k), float64 [B, G, Tq, Tk]."""
    each = scores(query, key, 1.0).clamp(min=0.0) * weights.double().unsqueeze(-1)
    return each.unflatten(1, (key.shape[1], -1)).sum(2)


def rounded(rows: Tensor) -> Tensor:
    """Each row [..., D] as 8-bit numbers times their scale, float64; the scale and quotients as float32 has them."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = rows.abs().amax(-1, keepdim=True) / 127
    numbers = (rows / scale).where(scale > 0, 0.0).round()
    assert bool((numbers.abs() <= 127).all())
    return numbers.double() * scale.double()


def first_of_group(per_head: Tensor, count: int) -> Tensor:
    """[B, Hq, …] → [B, G, …], for what does not differ within a group."""
    return per_head.unflatten(1, (count, -1))[:, :, 0]


def multiplicity(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """How often each key stands in each query's row of indices, float64 [B, Hq, Tq, Tk]."""
    if indices.dim() == 3:
        indices = indices.unsqueeze(1)
    length = key.shape[2]
    indices = indices.long()
    inside = (indices >= 0) & (indices < length)
    counts = torch.zeros(*indices.shape[:3], length + 1, dtype=torch.float64)
    counts.scatter_add_(-1, indices.where(inside, length), torch.ones(indices.shape, dtype=torch.float64))
    return counts[..., :length].repeat_interleave(query.shape[1] // indices.shape[1], dim=1)


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64, differentiable: softmax over each row's keys, repeated ones counting again."""
    counts = multiplicity(query, key, indices)
    attended = scores(query, key, scale, softcap).masked_fill(counts == 0, -math.inf)
    sink = sink_column(attended, sink_logits)
    alive = (counts > 0).any(-1) | (sink.squeeze(-1) > -math.inf)
    # The maximum only guards against overflow: it is a constant to the gradient.
    top = torch.cat((attended, sink), dim=-1).detach().amax(-1, keepdim=True)
    top = top.masked_fill(~alive.unsqueeze(-1), 0.0)
    weights = counts * (attended - top).exp()
    total = weights.sum(-1) + (sink - top).exp().squeeze(-1)
    lse = torch.where(alive, total.where(alive, 1.0).log() + top.squeeze(-1), -math.inf)
    value = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (weights / total.where(alive, 1.0).unsqueeze(-1)) @ value, lse


def topk_attention(
    query: Tensor, key: Tensor, value: Tensor, top_k: int, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, indices); out and lse differentiable."""
    with torch.no_grad():
        indices = topk_select(query, key, top_k, **options)
    scoring = (options.get(name) for name in ("scale", "softcap", "sink_logits"))
    return *gathered_attention(query, key, value, indices, *scoring), indices


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> list[Tensor]:
    """float64 gradients of query, key and value, and of sinks if there are any, by autograd."""
    given = (query, key, value) if sink_logits is None else (query, key, value, sink_logits)
    inputs = [t.detach().double().requires_grad_() for t in given]
    out, lse = gathered_attention(*inputs[:3], indices, scale, softcap, *inputs[3:])
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.where(lse > -math.inf, 0.0) * grad_lse.double()).sum()
    return list(torch.autograd.grad(loss, inputs))
