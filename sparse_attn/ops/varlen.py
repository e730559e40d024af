"""Packed sequences: end to end in one [T, H, D] tensor, found through `cu_seq` offsets, as in torch's `varlen_attn`.

A packed call is a call of the same op with one batch entry, in which each query has a first key and a causal offset of
its own: nothing is padded, and no key of another sequence is scored. Keys may lie in the pages of a cache: they are
found through `block_table`, as if all pages that it names lay end to end.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks import packed as check
from sparse_attn.ops import gathered_attention, indexer_select, paged_attention, topk_attention, topk_select
from sparse_attn.ops.paged_index import PagedKeyIndex
from sparse_attn.ops.shards import shardable, state
from sparse_attn.rule import Rule


class Sequences(NamedTuple):
    """Where the keys of each query's sequence lie, for every query of the pack."""

    first: Tensor  # int64 [T]: the sequence's first key; behind the last sequence Tk, so that nothing is seen
    keys: Tensor  # int64 [T]: how many there are
    offset: Tensor | int  # int64 [T]: with it query i sees keys first … i + offset; a number: of all queries
    longest: int  # the most keys of a sequence
    table: Tensor | None = None  # int32 [S, pages]: where keys lie in pages, end to end in its order

    def rule(self, **parts: Any) -> Rule:
        offset = self.offset if isinstance(self.offset, int) else self.offset[None]
        return Rule(True, offset, key_starts=self.first[None], **parts)

    def own(self, indices: Tensor, top_k: int) -> Tensor:
        """indices of keys of the pack, [1, G, T, K'] → of each sequence's own, [T, G, K]."""
        indices = indices[0, :, :, : min(top_k, self.longest)].transpose(0, 1)
        return torch.where(indices >= 0, indices - self.first[:, None, None], -1).to(torch.int32)

    def of_pack(self, indices: Tensor) -> Tensor:
        """The other way, [T, G, K] → int32 [1, G, T, K]; what is no key of the sequence becomes −1."""
        inside = (indices >= 0) & (indices < self.keys[:, None, None])
        found = torch.where(inside, indices + self.first[:, None, None], -1)
        return found.to(torch.int32).transpose(0, 1)[None]


def sequences(query: Tensor, key: Tensor, *given: Any, **named: Any) -> Sequences:
    """Those of the queries; inside context_parallel of this rank's queries among all of the pack."""
    if state.context is None:
        return _sequences(query, key, *given, **named)
    check.packed_tensor("query", query, "[T, Hq, D]")
    check.packed_tensor("key", key, "[Tk, Hkv, D]")
    length, positions = state.context.tokens(query.device)
    query, key = (t.new_zeros(()).expand(length, *t.shape[1:]) for t in (query, key))  # without memory
    found = _sequences(query, key, *given, **named)
    first, keys, offset = found.first, found.keys, found.offset
    assert isinstance(offset, Tensor)
    # One number, where it is one, is what every way of a context knows.
    plain = not bool(((offset != 0) & (keys > 0)).any())
    return Sequences(first[positions], keys[positions], 0 if plain else offset[positions], found.longest)


def _sequences(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    is_causal: bool,
    window: int,
    seqused_k: Tensor | None,  # int [S]
    block_table: Tensor | None = None,  # int [S, pages]; then key is [P, page size, Hkv, D]
) -> Sequences:
    check.packed_tensor("query", query, "[T, Hq, D]")
    check.offsets("cu_seq_q", cu_seq_q, query, "max_q", max_q)
    count = cu_seq_q.shape[0] - 1
    table = None
    if block_table is None:
        check.packed_tensor("key", key, "[Tk, Hkv, D]")
        if cu_seq_k is None:
            cu_seq_k = cu_seq_q
        total = key.shape[0]
        longest = check.offsets("cu_seq_k", cu_seq_k, key, "max_k", max_k)
        check.same_sequences(cu_seq_q, cu_seq_k)
        if seqused_k is not None:
            check.used(seqused_k, cu_seq_k, key)
    else:
        check.pages("key", key, "[P, page size, Hkv, D]")
        table = check.block_table_of(block_table, key, count)
        if cu_seq_k is None:
            longest = checks.integer("max_k", max_k, 0)
        else:
            longest = check.offsets("cu_seq_k", cu_seq_k, key, "max_k", max_k, paged=True)
            check.same_sequences(cu_seq_q, cu_seq_k)
        used = check.used_of_pages(seqused_k, cu_seq_k, table, block_table, key, longest)
        room = table.shape[1] * key.shape[1]
        total = count * room
    is_causal = checks.boolean("is_causal", is_causal)
    if window and not is_causal:
        checks.kept(window, 0, is_causal)

    few = checks.few_numbers(cu_seq_q, cu_seq_k if table is None else used, seqused_k) if count else None
    if few is not None and query.shape[0] <= _FEW_QUERIES:
        bounds_q, lengths, given = few
        if table is None:
            starts, lengths = lengths[:-1], [b - a for a, b in itertools.pairwise(lengths)]
            lengths = lengths if seqused_k is None else given
        else:
            starts = [s * room for s in range(count)]
        each = _each_query(bounds_q, starts, lengths, total, query.shape[0], is_causal)
        first, seen, offset = torch.tensor(each, dtype=torch.int64, device=query.device).unbind()
        return Sequences(first, seen, offset, longest, table)

    if table is None:
        assert cu_seq_k is not None
        bounds_k = cu_seq_k.to(torch.int64).clamp(0, total)
        begins, keys = bounds_k[:-1], bounds_k.diff().clamp(min=0)
        if seqused_k is not None:
            keys = torch.minimum(seqused_k.to(torch.int64).clamp(min=0), keys)
    else:
        begins, keys = torch.arange(count, device=query.device) * room, used.to(torch.int64).clamp(0, room)
    position = torch.arange(query.shape[0], device=query.device)
    if count == 0:
        nothing = torch.zeros_like(position)
        return Sequences(nothing + total, nothing, nothing, longest, table)
    ends = cu_seq_q[1:].to(torch.int64)
    sequence = torch.bucketize(position, ends, right=True)
    outside = sequence >= count
    sequence = sequence.clamp(max=count - 1)
    first = torch.where(outside, total, begins[sequence])
    seen = torch.where(outside, 0, keys[sequence])
    if is_causal:  # the last query sees the last key
        offset = first + seen - ends[sequence]
    else:
        offset = first + seen - 1 - position
    return Sequences(first, seen, offset, longest, table)


_FEW_QUERIES = 256  # whose numbers are not worth a call of torch each


def _each_query(
    bounds_q: list[int], starts: list[int], keys: list[int], total: int, tokens: int, is_causal: bool
) -> tuple[list[int], list[int], list[int]]:
    """(first, keys, offset) of :class:`Sequences`, of sequences whose numbers are checked."""
    first, seen, offset = [], [], []
    for start, own, begin, end in zip(starts, keys, bounds_q, bounds_q[1:], strict=False):
        for i in range(begin, end):
            first.append(start)
            seen.append(own)
            offset.append(start + own - end if is_causal else start + own - 1 - i)
    for i in range(bounds_q[-1], tokens):
        first.append(total)
        seen.append(0)
        offset.append(total - bounds_q[-1] if is_causal else total - 1 - i)
    return first, seen, offset


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
    block_table: Tensor | None = None,  # int [S, pages]
    physical_indices: bool = False,
    key_index: PagedKeyIndex | None = None,
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
        block_table: int32 (or int64) [S, pages]; key is then a cache in pages, [P, page size, Hkv, D], of a page size
            of 1 or a multiple of 16, and the keys of sequence s lie in its pages ``block_table[s, 0]``, ``[s, 1]``, …
            How many there are say seqused_k, or the differences of cu_seq_k (None is not cu_seq_q then), or both.
            Entries and keys beyond them may be anything; sequences may share pages.
        physical_indices: with block_table give indices as page · page size + place in the page.
        key_index: with block_table the :class:`sparse_attn.PagedKeyIndex` of these pages: the same result, in decoding
            for fewer bytes.

    Returns:
        int32 [T, G, min(top_k, max_k)], of Tk slots at most where there are no pages, counted from the start of each
        query's own sequence; unique, ascending, empty slots −1 at the end. Bit for bit what `topk_select` gives for
        each sequence alone. With physical_indices the same keys in the same order.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        IndexError: block_table has no page where a sequence has keys (read on the CPU; elsewhere such keys count as
            absent).

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(20, 4, 16), torch.randn(20, 2, 16)
        >>> cu_seq = torch.tensor([0, 12, 12, 20])  # three documents, one of them empty
        >>> sparse_attn.varlen_topk_select(q, k, cu_seq, None, 12, 12, 8, is_causal=True, sinks=1).shape
        torch.Size([20, 4, 8])
    """
    physical_indices = check.kind_of_indices(physical_indices, block_table)
    check.index_of_pages(key_index, block_table)
    given = cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, seqused_k, block_table
    where = sequences(query, key, *given)
    top_k = checks.top_k_of(top_k)
    scoring = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    rule = where.rule(window=window, sinks=sinks, share=share, **scoring)
    if where.table is not None:
        own: dict[str, Any] = {"key_index": key_index, "backend": backend, "function": "varlen_topk_select"}
        found = paged_attention.select(query, key, where.table, top_k, rule, **own)
        return _given_out(found, where, top_k, key, physical_indices)
    q, k = _batched(query, key)
    indices = topk_select.select(q, k, top_k, rule, backend=backend, function="varlen_topk_select")
    return where.own(indices, top_k)


def _given_out(indices: Tensor, where: Sequences, top_k: int, key: Tensor, physical_indices: bool) -> Tensor:
    """A selection from pages, [1, G, T, K'], as the caller gets it, [T, G, K]."""
    if not physical_indices:
        return where.own(indices, top_k)
    assert where.table is not None
    indices = indices[..., : min(top_k, where.longest)]
    pages, size = key.shape[:2]
    return paged_attention.physical(indices, where.table, size, pages, size)[0].transpose(0, 1)


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
    tail: str = "none",
    return_lse: bool = False,
    return_indices: bool = False,
    block_table: Tensor | None = None,  # int [S, pages]
    physical_indices: bool = False,
    key_index: PagedKeyIndex | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r""":func:`topk_attention` of packed sequences, in place of `torch.nn.attention.varlen.varlen_attn`.

    Sequence s has the queries ``cu_seq_q[s] … cu_seq_q[s + 1] − 1`` and the keys ``cu_seq_k[s] … cu_seq_k[s + 1] − 1``.
    Nothing is padded, and nothing of one sequence reaches another, gradients neither.

    Args:
        query: [T, Hq, D], float32, float16, bfloat16 or float64, any strides; queries behind the last sequence see
            nothing: out 0, lse −inf.
        key: [Tk, Hkv, D], same dtype and device; Hq must be a multiple of Hkv.
        value: [Tk, Hkv, Dv]; Dv may differ from D. With block_table pages as the keys are, [P, page size, Hkv, Dv].
        cu_seq_q, cu_seq_k, max_q, max_k, top_k, seqused_k, is_causal, window, sinks, scale, share, softcap,
            sink_logits, block_table, physical_indices, key_index, backend: as in :func:`varlen_topk_select`. With
            block_table nothing is differentiated.
        tail: as in :func:`topk_attention`, blocks of 64 counted from the first key of the pack; with block_table "none"
            alone.
        return_lse: also return the log-sum-exp of the attended scores, float32 [T, Hq] (differentiable); with a
            tail of what it adds, too.
        return_indices: also return the selection, as :func:`varlen_topk_select` gives it.

    Returns:
        out [T, Hq, Dv] in the query's dtype; with flags the tuple (out, lse, indices) of what was asked for. Bit for
        bit what `topk_attention` gives for each sequence alone (with tail="mean" up to rounding, with
        "blocks" where a sequence begins on a multiple of 64).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        IndexError: block_table has no page where a sequence has keys.
        NotImplementedError: with block_table, in grad mode, a tensor requires a gradient.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(20, h, 16, requires_grad=True) for h in (4, 2, 2))
        >>> cu_seq = torch.tensor([0, 12, 20])
        >>> out = sparse_attn.varlen_topk_attention(q, k, v, cu_seq, None, 12, 12, 8, is_causal=True)
        >>> out.sum().backward()
        >>> q = torch.randn(2, 4, 16)  # a step of two sequences over a cache of ten pages of 16 tokens
        >>> k, v = torch.randn(10, 16, 2, 16), torch.randn(10, 16, 2, 16)
        >>> table, used = torch.tensor([[7, 2, 4], [3, -1, -1]], dtype=torch.int32), torch.tensor([40, 9])
        >>> cu_seq = torch.tensor([0, 1, 2])
        >>> sparse_attn.varlen_topk_attention(
        ...     q, k, v, cu_seq, None, 1, 48, 8, is_causal=True, seqused_k=used, block_table=table
        ... ).shape
        torch.Size([2, 4, 16])
    """
    return_lse = checks.boolean("return_lse", return_lse)
    return_indices = checks.boolean("return_indices", return_indices)
    physical_indices = check.kind_of_indices(physical_indices, block_table)
    check.index_of_pages(key_index, block_table)
    if checks.tail_of(tail) != "none" and block_table is not None:
        raise ValueError(
            f"tail={tail!r} needs keys and values that lie in one tensor, got block_table: pages take 'none'"
        )
    given = cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, seqused_k, block_table
    where = sequences(query, key, *given)
    (check.packed_value if where.table is None else check.paged_value)(value, key)
    top_k = checks.top_k_of(top_k)
    scoring = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    rule = where.rule(window=window, sinks=sinks, share=share, **scoring)
    if where.table is None:
        q, k, v = _batched(query, key, value)
        own: dict[str, Any] = {"backend": backend, "function": "varlen_topk_attention"}
        if tail == "none":
            out, lse, indices = topk_attention.attend_best(q, k, v, top_k, rule, **own)
        else:
            out, lse, indices = topk_attention.attend_all(q, k, v, top_k, rule, tail, **own)
        out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    else:
        check.no_gradient(query, key, value, sink_logits)
        own = {"key_index": key_index, "backend": backend, "function": "varlen_topk_attention"}
        out, lse, indices = paged_attention.attend_best(query, key, value, where.table, top_k, rule, **own)
    found: tuple[Tensor, ...] = (out,)
    if return_lse:
        found += (lse,)
    if return_indices:
        found += (_given_out(indices, where, top_k, key, physical_indices),)
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
    block_table: Tensor | None = None,  # int [S, pages]
    physical_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`gathered_attention` of packed sequences: each query attends to given keys of its own sequence.

    Args:
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table: as in
            :func:`varlen_topk_attention`.
        indices: int32 or int64 [T, G, K], counted from the start of each query's own sequence, G one of 1, Hkv, Hq.
            What is negative, or no key of that sequence, is an empty slot and is never read through.
        physical_indices: with block_table, indices are page · page size + place in the page, of any page that there is:
            whose it is, and how much of it is used, is not asked.
        scale, softcap, sink_logits, return_lse, backend: as in :func:`gathered_attention`.

    Returns:
        out [T, Hq, Dv]; with return_lse (out, lse float32 [T, Hq]).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        IndexError: block_table has no page where a sequence has keys.
        NotImplementedError: with block_table, in grad mode, a tensor requires a gradient.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = (torch.randn(20, 4, 16) for _ in range(3))
        >>> cu_seq, sizes = torch.tensor([0, 12, 20]), (12, 12)
        >>> indices = sparse_attn.varlen_topk_select(q, k, cu_seq, None, *sizes, 8, is_causal=True)
        >>> sparse_attn.varlen_gathered_attention(q, k, v, indices, cu_seq, None, *sizes).shape
        torch.Size([20, 4, 16])
    """
    return_lse = checks.boolean("return_lse", return_lse)
    physical_indices = check.kind_of_indices(physical_indices, block_table)
    where = sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, False, 0, seqused_k, block_table)
    (check.packed_value if where.table is None else check.paged_value)(value, key)
    check.packed_indices(indices, query, key)
    scoring: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    if where.table is None:
        q, k, v = _batched(query, key, value)
        out, lse = gathered_attention.attend(q, k, v, where.of_pack(indices), **scoring, backend=backend)
    else:
        check.no_gradient(query, key, value, sink_logits)
        pages, size = key.shape[:2]
        step, (k, v) = paged_attention.rows(key, value)
        if physical_indices:
            chosen = paged_attention.placed(indices.transpose(0, 1)[None], size, pages, step)
        else:
            chosen = paged_attention.physical(where.of_pack(indices), where.table, size, pages, step)
        q = query.transpose(0, 1)[None]
        out, lse = gathered_attention.attend(q, k, v, chosen, **scoring, backend=backend)
    out = out[0].transpose(0, 1)
    return (out, lse[0].transpose(0, 1)) if return_lse else out


@shardable("query:THD key:SHD weights:TH", "TGK")
def varlen_indexer_select(
    query: Tensor,  # [T, G·Hi, D]
    key: Tensor,  # [Tk, G, D]
    weights: Tensor,  # [T, G·Hi]
    cu_seq_q: Tensor,  # int [S + 1]
    cu_seq_k: Tensor | None,  # int [S + 1]
    max_q: int,
    max_k: int,
    top_k: int,
    *,
    seqused_k: Tensor | None = None,  # int [S]
    is_causal: bool = False,
    window: int = 0,
    sinks: int = 0,
    int8: bool = False,
    backend: str | None = None,
) -> Tensor:  # int32 [T, G, K]
    r""":func:`indexer_select` of packed sequences: each query chooses among the keys of its own sequence.

    Args:
        query: [T, G·Hi, D], float32, float16, bfloat16 or float64; the Hi heads of a group stand next to each other.
        key: [Tk, G, D], same dtype and device: one key head per group.
        weights: [T, G·Hi], any float dtype.
        cu_seq_q, cu_seq_k, max_q, max_k, top_k, seqused_k, is_causal, window, sinks: as in
            :func:`varlen_topk_select`.
        int8, backend: as in :func:`indexer_select`.

    Returns:
        int32 [T, G, min(top_k, max_k, Tk)], counted from the start of each query's own sequence; bit for bit what
        `indexer_select` gives for each sequence alone.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, w = torch.randn(20, 4, 16), torch.randn(20, 1, 16), torch.randn(20, 4)
        >>> cu_seq = torch.tensor([0, 12, 20])
        >>> sparse_attn.varlen_indexer_select(q, k, w, cu_seq, None, 12, 12, 8, is_causal=True).shape
        torch.Size([20, 1, 8])
    """
    where = sequences(query, key, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, window, seqused_k)
    check.packed_weights(weights, query)
    top_k = checks.top_k_of(top_k)
    q, k = _batched(query, key)
    rule = where.rule(window=window, sinks=sinks)
    indices = indexer_select.select(
        q, k, weights.T[None], top_k, rule, int8=int8, backend=backend, function="varlen_indexer_select"
    )
    return where.own(indices, top_k)
