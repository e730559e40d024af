"""`topk_attention_with_residual`: what the selection leaves out, put back as the mean of its values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.gathered_attention import gathered_attention
from sparse_attn.ops.topk_attention import topk_attention
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.topk_select import products


@torch.no_grad()
def topk_attention_with_residual(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    top_k: int,
    *,
    is_causal: bool = False,
    causal_offset: int | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    backend: str | None = None,
) -> Tensor:
    r"""`topk_attention` that gives the mass of the keys it leaves out to the mean of their values. Inference only.

    With p the softmax over all visible keys V_i and S_i the selection:

    .. math:: \mathrm{out}_i = \sum_{j \in S_i} p_{ij} v_j + \Bigl(1 - \sum_{j \in S_i} p_{ij}\Bigr)
              \mathop{\mathrm{mean}}_{j \in V_i \setminus S_i} v_j

    The mean comes from prefix sums. The normaliser of p needs every score, so this is for the quality of a given
    selection, not for speed: it is plain PyTorch around :func:`topk_attention`, and stores no [Tq, Tk] matrix.

    Args:
        query, key, value, top_k, is_causal, causal_offset, key_lengths, scale, window, sinks, share, backend: as in
            :func:`topk_attention`. There is no attn_mask: what a query sees must be a prefix of the keys.

    Returns:
        out [B, Hq, Tq, Dv] in the query's dtype, without a gradient.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
        >>> sparse_attn.topk_attention_with_residual(q, k, v, 16, is_causal=True).shape
        torch.Size([1, 2, 128, 16])
    """
    query, key, value = autocast(query, key, value)
    out, lse, indices = topk_attention(
        query, key, value, top_k, is_causal=is_causal, causal_offset=causal_offset, key_lengths=key_lengths,
        scale=scale, window=window, sinks=sinks, share=share, return_lse=True, return_indices=True, backend=backend,
    )  # fmt: skip
    if out.numel() == 0 or key.shape[2] == 0:
        return out
    heads, query_length = query.shape[1:3]
    compute = torch.promote_types(query.dtype, torch.float32)
    scale = checks.softmax_scale(scale, query.shape[3])
    offset = checks.causal_offset_of(is_causal, causal_offset, query_length, key.shape[2])
    seen = torch.full(
        (query.shape[0], query_length), key.shape[2], device=query.device
    )  # [B, Tq], a prefix each
    if key_lengths is not None:
        seen = torch.minimum(seen, key_lengths.to(torch.int64).unsqueeze(-1))
    if is_causal:
        seen = torch.minimum(seen, torch.arange(1, query_length + 1, device=query.device) + offset)
    seen = seen.clamp(min=0)

    # The mean of what is left out, from the sum of what is seen and of what is selected.
    prefix = pad(value.double().cumsum(2), (0, 0, 1, 0))  # float32 would round late values away
    total = prefix.gather(2, seen[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))
    values, chosen = value.to(compute), (indices >= 0).sum(-1)  # chosen [B, G, Tq]
    nothing = values.new_zeros((1, 1, 1, 1)).expand(*query.shape[:3], value.shape[3])
    mean = gathered_attention(nothing, values, values, indices, scale=1.0, backend=backend)
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], dim=1).unsqueeze(-1)
    total = total.repeat_interleave(heads // value.shape[1], dim=1) - mean.double() * chosen
    left = seen[:, None, :, None] - chosen
    tail = (total / left.clamp(min=1)).to(compute)

    keys = key.to(compute)
    position = torch.arange(key.shape[2], device=key.device)
    for rows in query_chunks(query_length, 2 * query.shape[0] * heads * key.shape[2]):
        scores = products(query[:, :, rows].to(compute), keys) * scale
        every = scores.masked_fill_(position >= seen[:, None, rows, None], -torch.inf).logsumexp(-1)
        outside = -torch.expm1((lse[:, :, rows] - every).clamp(max=0.0)).unsqueeze(-1).to(compute)
        part = out[:, :, rows].to(compute)
        mixed = part + outside * (tail[:, :, rows] - part)
        out[:, :, rows] = torch.where(left[:, :, rows] > 0, mixed, part).to(out.dtype)
    return out
