"""What a selection leaves out, put back as the mean of its values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.gathered_attention import attend
from sparse_attn.rule import Rule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.topk_select import products


@torch.no_grad()
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
    """`out` with the mass of what the selection leaves out given to the mean of its values; it is changed in place."""
    query, key, value = autocast(query, key, value)
    if out.numel() == 0 or key.shape[2] == 0:
        return out
    seen_by = rule.packed(query, key)
    # What a query sees must be keys in a row.
    rule.visibility().only(
        "means of what is left out", "is_causal", "causal_offset", "key_lengths", "key_starts", "scale"
    )
    scale = seen_by.scale
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
    mean, _ = attend(nothing, values, values, indices, scale=1.0, backend=backend)
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], dim=1).unsqueeze(-1)
    total = total.repeat_interleave(heads // value.shape[1], dim=1) - mean.double() * chosen
    left = (seen if first is None else seen - first)[:, None, :, None] - chosen
    tail = (total / left.clamp(min=1)).to(compute)

    keys = key.to(compute)
    position = torch.arange(key.shape[2], device=key.device)
    for rows in query_chunks(query_length, 2 * query.shape[0] * heads * key.shape[2]):
        scores = products(query[:, :, rows].to(compute), keys) * scale
        scores.masked_fill_(position >= seen[:, None, rows, None], -torch.inf)
        if first is not None:
            scores.masked_fill_(position < first[:, None, rows, None], -torch.inf)
        every = scores.logsumexp(-1)
        outside = -torch.expm1((lse[:, :, rows] - every).clamp(max=0.0)).unsqueeze(-1).to(compute)
        part = out[:, :, rows].to(compute)
        mixed = part + outside * (tail[:, :, rows] - part)
        out[:, :, rows] = torch.where(left[:, :, rows] > 0, mixed, part).to(out.dtype)
    return out


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
