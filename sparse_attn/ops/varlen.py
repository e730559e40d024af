"""Packed sequences: end to end in one [T, H, D] tensor, found through `cu_seq` offsets, as in torch's `varlen_attn`.

A packed call is a call of the same op with one batch entry, in which each query has a first key and a causal offset of
its own: nothing is padded, and no key of another sequence is scored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks import packed as check
from sparse_attn.ops import gathered_attention, topk_attention, topk_select
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import Rule


class Sequences(NamedTuple):
    """Where the keys of each query's sequence lie, for every query of the pack."""

    first: Tensor  # int64 [T]: the sequence's first key; behind the last sequence Tk, so that nothing is seen
    keys: Tensor  # int64 [T]: how many there are
    offset: Tensor  # int64 [T]: with it query i sees keys first … i + offset
    longest: int  # the most keys of a sequence

    def rule(self, **parts: Any) -> Rule:
        return Rule(True, self.offset[None], key_starts=self.first[None], **parts)

    def own(self, indices: Tensor, top_k: int) -> Tensor:
        """indices of keys of the pack, [1, G, T, K'] → of each sequence's own, [T, G, K]."""
        indices = indices[0, :, :, : min(top_k, self.longest)].transpose(0, 1)
        return torch.where(indices >= 0, indices - self.first[:, None, None], -1).to(torch.int32)

    def of_pack(self, indices: Tensor) -> Tensor:
        """The other way, [T, G, K] → [1, G, T, K]; what is no key of the sequence becomes −1."""
        inside = (indices >= 0) & (indices < self.keys[:, None, None])
        found = torch.where(inside, indices + self.first[:, None, None], -1)
        return found.to(torch.int32).transpose(0, 1)[None]


def sequences(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    is_causal: bool,
    window: int,
    seqused_k: Tensor | None,  # int [S]
) -> Sequences:
    check.packed_tensor("query", query, "[T, Hq, D]")
    check.packed_tensor("key", key, "[Tk, Hkv, D]")
    check.offsets("cu_seq_q", cu_seq_q, query, "max_q", max_q)
    if cu_seq_k is None:
        cu_seq_k = cu_seq_q
    longest = check.offsets("cu_seq_k", cu_seq_k, key, "max_k", max_k)
    check.same_sequences(cu_seq_q, cu_seq_k)
    if seqused_k is not None:
        check.used(seqused_k, cu_seq_k, key)
    is_causal = checks.boolean("is_causal", is_causal)
    if window and not is_causal:
        checks.kept(window, 0, is_causal)

    length, count = query.shape[0], cu_seq_q.shape[0] - 1
    position = torch.arange(length, device=query.device)
    if count == 0:
        nothing = torch.zeros_like(position)
        return Sequences(nothing + key.shape[0], nothing, nothing, longest)
    bounds_q, bounds_k = cu_seq_q.to(torch.int64), cu_seq_k.to(torch.int64).clamp(0, key.shape[0])
    sequence = torch.bucketize(position, bounds_q[1:], right=True)
    outside = sequence >= count
    sequence = sequence.clamp(max=count - 1)
    keys = bounds_k.diff().clamp(min=0)
    if seqused_k is not None:
        keys = torch.minimum(seqused_k.to(torch.int64).clamp(min=0), keys)
    first = torch.where(outside, key.shape[0], bounds_k[:-1][sequence])
    seen = torch.where(outside, 0, keys[sequence])
    if is_causal:  # the last query sees the last key
        offset = first + seen - bounds_q[1:][sequence]
    else:
        offset = first + seen - 1 - position
    return Sequences(first, seen, offset, longest)


def _batched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, H, D] → [1, H, T, D], views."""
    return tuple(t.transpose(0, 1)[None] for t in tensors)


@shardable("query:THD key:SHD sink_logits:H", "TGK")
def varlen_topk_select(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    top_k: int,
    *,
    seqused_k: Tensor | None = None,  # int [S]
    is_causal: bool = False,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor:  # int32 [T, G, K]
    r""":func:`topk_select` of packed sequences: each query chooses among the keys of its own sequence.

    Sequence s has the queries ``cu_seq_q[s] … cu_seq_q[s + 1] − 1`` and the keys ``cu_seq_k[s] … cu_seq_k[s + 1] − 1``.

    Args:
        query: [T, Hq, D], float32, float16, bfloat16 or float64, any strides; queries behind the last sequence choose
            nothing.
        key: [Tk, Hkv, D], same dtype and device; Hq must be a multiple of Hkv.
        cu_seq_q: int32 or int64 [S + 1], from 0 on, not falling. Empty sequences are allowed.
        cu_seq_k: the same of the keys; None takes cu_seq_q.
        max_q, max_k: the longest sequence of queries, of keys, or more.
        top_k: keys per query, the whole budget (window and sinks count toward it), at least 1.
        seqused_k: int32 or int64 [S]; of each sequence the first so many keys exist.
        is_causal: the last query of a sequence sees its last (used) key, the one before it one key less, and so on, as
            in flash-attention's packed calls.
        window: always keep the last `window` keys up to the query's own; needs is_causal.
        sinks: always keep the first `sinks` keys of each sequence.
        scale, share, softcap, sink_logits, backend: as in :func:`topk_select`.

    Returns:
        int32 [T, G, min(top_k, max_k)], counted from the start of each query's own sequence; unique, ascending, empty
        slots −1 at the end. Bit for bit what `topk_select` gives for each sequence alone.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(20, 4, 16), torch.randn(20, 2, 16)
        >>> cu_seq = torch.tensor([0, 12, 12, 20])  # three documents, one of them empty
        >>> sparse_attn.varlen_topk_select(q, k, cu_seq, None, 12, 12, 8, is_causal=True, sinks=1).shape
        torch.Size([20, 4, 8])
    """
    where = sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, seqused_k)
    top_k = checks.top_k_of(top_k)
    scoring = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    rule = where.rule(window=window, sinks=sinks, share=share, **scoring)
    q, k = _batched(query, key)
    indices = topk_select.select(q, k, top_k, rule, backend=backend, function="varlen_topk_select")
    return where.own(indices, top_k)


@shardable("query:THD key:SHD value:SHD sink_logits:H", "THD TH TGK")
def varlen_topk_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    top_k: int,
    *,
    seqused_k: Tensor | None = None,  # int [S]
    is_causal: bool = False,
    scale: float | None = None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r""":func:`topk_attention` of packed sequences, in place of `torch.nn.attention.varlen.varlen_attn`.

    Sequence s has the queries ``cu_seq_q[s] … cu_seq_q[s + 1] − 1`` and the keys ``cu_seq_k[s] … cu_seq_k[s + 1] − 1``.
    Nothing is padded, and nothing of one sequence reaches another, gradients neither.

    Args:
        query: [T, Hq, D], float32, float16, bfloat16 or float64, any strides; queries behind the last sequence see
            nothing: out 0, lse −inf.
        key: [Tk, Hkv, D], same dtype and device; Hq must be a multiple of Hkv.
        value: [Tk, Hkv, Dv]; Dv may differ from D.
        cu_seq_q, cu_seq_k, max_q, max_k, top_k, seqused_k, is_causal, window, sinks, scale, share, softcap,
            sink_logits, backend: as in :func:`varlen_topk_select`.
        return_lse: also return the log-sum-exp of the attended scores, float32 [T, Hq] (differentiable).
        return_indices: also return the selection, as :func:`varlen_topk_select` gives it.

    Returns:
        out [T, Hq, Dv] in the query's dtype; with flags the tuple (out, lse, indices) of what was asked for. Bit for
        bit what `topk_attention` gives for each sequence alone.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(20, h, 16, requires_grad=True) for h in (4, 2, 2))
        >>> cu_seq = torch.tensor([0, 12, 20])
        >>> out = sparse_attn.varlen_topk_attention(q, k, v, cu_seq, None, 12, 12, 8, is_causal=True)
        >>> out.sum().backward()
    """
    return_lse = checks.boolean("return_lse", return_lse)
    return_indices = checks.boolean("return_indices", return_indices)
    where = sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, seqused_k)
    check.packed_value(value, key)
    top_k = checks.top_k_of(top_k)
    scoring = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    rule = where.rule(window=window, sinks=sinks, share=share, **scoring)
    q, k, v = _batched(query, key, value)
    out, lse, indices = topk_attention.attend_best(
        q, k, v, top_k, rule, backend=backend, function="varlen_topk_attention"
    )
    found: tuple[Tensor, ...] = (out[0].transpose(0, 1),)
    if return_lse:
        found += (lse[0].transpose(0, 1),)
    if return_indices:
        found += (where.own(indices, top_k),)
    return found if len(found) > 1 else found[0]


@shardable("query:THD key:SHD value:SHD indices:TGK sink_logits:H", "THD TH")
def varlen_gathered_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    indices: Tensor,  # int [T, G, K]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    *,
    seqused_k: Tensor | None = None,  # int [S]
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`gathered_attention` of packed sequences: each query attends to given keys of its own sequence.

    Args:
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k: as in :func:`varlen_topk_attention`.
        indices: int32 or int64 [T, G, K], counted from the start of each query's own sequence, G one of 1, Hkv, Hq.
            What is negative, or no key of that sequence, is an empty slot and is never read through.
        scale, softcap, sink_logits, return_lse, backend: as in :func:`gathered_attention`.

    Returns:
        out [T, Hq, Dv]; with return_lse (out, lse float32 [T, Hq]).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(20, 4, 16) for _ in range(3))
        >>> cu_seq, sizes = torch.tensor([0, 12, 20]), (12, 12)
        >>> indices = sparse_attn.varlen_topk_select(q, k, cu_seq, None, *sizes, 8, is_causal=True)
        >>> sparse_attn.varlen_gathered_attention(q, k, v, indices, cu_seq, None, *sizes).shape
        torch.Size([20, 4, 16])
    """
    return_lse = checks.boolean("return_lse", return_lse)
    where = sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, False, 0, seqused_k)
    check.packed_value(value, key)
    check.packed_indices(indices, query, key)
    q, k, v = _batched(query, key, value)
    out, lse = gathered_attention.attend(
        q,
        k,
        v,
        where.of_pack(indices),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        backend=backend,
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0].transpose(0, 1)) if return_lse else out
