"""What a selection leaves out, put back as the mean of its values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.gathered_attention import attend
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import Rule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.rule import capped
from sparse_attn.wings.reference.topk_select import products


@shardable("query:BHTD key:BHSD value:BHSD out:BHTD lse:BHT indices:BGTK rule", "BHTD")
def with_tail(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    out: Tensor,  # [B, Hq, Tq, Dv]: attention to the selection
    lse: Tensor,  # [B, Hq, Tq]: of the selection
    indices: Tensor,  # int32 [B, G, Tq, K]: the selection
    rule: Rule,
    *,
    backend: str | None = None,
) -> Tensor:
    """`out` with the mass of what the selection leaves out given to the mean of its values, differentiable in all."""
    query, key, value = autocast(query, key, value)
    if out.numel() == 0 or key.shape[2] == 0:
        return out
    seen_by = rule.packed(query, key)
    # What a query sees must be keys in a row.
    known = "is_causal", "causal_offset", "key_lengths", "key_starts", "scale", "softcap", "sink_logits"
    rule.visibility().only("means of what is left out", *known)
    heads, query_length = query.shape[1:3]
    compute = torch.promote_types(query.dtype, torch.float32)
    seen = torch.full(
        (query.shape[0], query_length), key.shape[2], device=query.device
    )  # [B, Tq]: up to there
    if seen_by.key_lengths is not None:
        seen = torch.minimum(seen, seen_by.key_lengths.to(torch.int64).unsqueeze(-1))
    if seen_by.is_causal:
        last = torch.arange(1, query_length + 1, device=query.device) + seen_by.causal_offset
        seen = torch.minimum(seen, last)
    seen = seen.clamp(min=0)
    first = None  # [B, Tq]: from there on
    if seen_by.key_starts is not None:
        first = torch.minimum(seen_by.key_starts.to(torch.int64).clamp(min=0), seen)

    # The mean of what is left out, from the sum of what is seen and of what is selected.
    total = _sums(value, first, seen)
    values, chosen = value.to(compute), (indices >= 0).sum(-1)  # chosen [B, G, Tq]
    nothing = values.new_zeros((1, 1, 1, 1)).expand(*query.shape[:3], value.shape[3])
    mean, _ = attend(nothing, values.detach(), values, indices, scale=1.0, backend=backend)
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], dim=1).unsqueeze(-1)
    total = total.repeat_interleave(heads // value.shape[1], dim=1) - mean.double() * chosen
    left = (seen if first is None else seen - first)[:, None, :, None] - chosen  # [B, Hq, Tq, 1]
    tail = (total / left.clamp(min=1)).to(compute)

    # Forward mode goes through what it is made of.
    normalise = _Normaliser.apply if forward_ad._current_level < 0 else _in_chunks
    every = normalise(query, key, first, seen, seen_by.scale, seen_by.softcap)
    if seen_by.sink_logits is not None:
        # Two of −inf would have no gradient.
        extra = seen_by.sink_logits.clamp(min=torch.finfo(compute).min)
        every = torch.logaddexp(every, extra.unsqueeze(-1))
    gap = lse - every
    # Where nothing is left out the gap may be −inf − −inf, which has no gradient.
    gap = torch.where(left.squeeze(-1) > 0, gap, 0.0).clamp(max=0.0)
    outside = -torch.expm1(gap).unsqueeze(-1).to(compute)
    part = out.to(compute)
    mixed = part + outside * (tail - part)
    return torch.where(left > 0, mixed, part).to(out.dtype)


class _Normaliser(torch.autograd.Function):
    """log-sum-exp of a query's scores over the keys that it sees: [B, Hq, Tq].

    In chunks of queries, whose scores are made again for the gradient: no [Tq, Tk] matrix is stored.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, first: Tensor | None, end: Tensor, scale: float, softcap: float
    ) -> Tensor:
        return _in_chunks(query, key, first, end, scale, softcap)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        query, key, first, end, *ctx.scoring = inputs
        ctx.save_for_backward(query, key, first, end)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, first, end = ctx.saved_tensors
        keys = key.to(torch.promote_types(key.dtype, torch.float32))
        of_query, of_key = [], torch.zeros_like(keys)
        for rows in _chunks(query, key):
            seen = {"first": _at(rows, first), "end": end[:, rows]}
            chunk = partial(_normaliser, **seen, scale=ctx.scoring[0], softcap=ctx.scoring[1])
            gradient = torch.func.vjp(chunk, query[:, :, rows], keys)[1]
            of_rows, of_keys = gradient(grad[:, :, rows])
            of_query.append(of_rows)
            of_key = of_key + of_keys
        return torch.cat(of_query, dim=2), of_key.to(key.dtype), None, None, None, None


def _in_chunks(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    first: Tensor | None,  # int64 [B, Tq]: the keys from there on
    end: Tensor,  # int64 [B, Tq]: and before there
    scale: float,
    softcap: float,  # 0: none
) -> Tensor:  # [B, Hq, Tq]
    keys = key.to(torch.promote_types(key.dtype, torch.float32))
    found = [
        _normaliser(query[:, :, rows], keys, _at(rows, first), end[:, rows], scale, softcap)
        for rows in _chunks(query, key)
    ]
    return torch.cat(found, dim=2)


def _normaliser(
    query: Tensor, keys: Tensor, first: Tensor | None, end: Tensor, scale: float, softcap: float
) -> Tensor:
    """query [B, Hq, t, D], keys [B, Hkv, Tk, D] as they are computed with, int64 [B, t] twice → [B, Hq, t]."""
    scores = capped(products(query.to(keys.dtype), keys) * scale, softcap)
    position = torch.arange(keys.shape[2], device=keys.device)
    scores = scores.masked_fill_(position >= end[:, None, :, None], -torch.inf)
    if first is not None:
        scores = scores.masked_fill_(position < first[:, None, :, None], -torch.inf)
    return scores.logsumexp(-1)


def _at(rows: slice, places: Tensor | None) -> Tensor | None:
    return None if places is None else places[:, rows]


def _chunks(query: Tensor, key: Tensor) -> Iterator[slice]:
    return query_chunks(query.shape[2], 2 * query.shape[0] * query.shape[1] * key.shape[2])


def _sums(value: Tensor, first: Tensor | None, end: Tensor) -> Tensor:
    """Σ value[first … end − 1] of each query: [B, Hkv, Tk, Dv], int64 [B, Tq] twice → float64 [B, Hkv, Tq, Dv]."""

    def up_to(places: Tensor, rows: Tensor) -> Tensor:
        prefix = pad(rows.double().cumsum(2), (0, 0, 1, 0))  # float32 would round late values away
        return prefix.gather(2, places[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))

    if first is None:
        return up_to(end, value)
    # Apart from the sum: what is no number would stay in it for all queries behind, whether they see it or not.
    total = up_to(end, value.nan_to_num(0.0, 0.0, 0.0))
    total = total - up_to(first, value.nan_to_num(0.0, 0.0, 0.0))
    for special, there in (
        (torch.inf, value == torch.inf),
        (-torch.inf, value == -torch.inf),
        (torch.nan, value.isnan()),
    ):
        total = total + torch.where(up_to(end, there) > up_to(first, there), special, 0.0)
    return total
