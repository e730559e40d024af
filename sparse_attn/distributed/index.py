"""The way of context parallelism in which 8-bit rows of all keys come to the queries, and the keys that these leave.

The rows and bounds of a :class:`sparse_attn.KeyIndex` are all-gathered. By them each rank rules out for its queries
what is proven not to be among the best, and asks the owners for the other keys. Among these the kernel itself chooses,
on the keys as they are: what it chooses is what it would choose of all keys, bit for bit, for a key that it is not
given scores less than K that it is given. Last come the values of the chosen, and gradients go back the same way.

The kernel sees the candidates as a sequence of their own, in ascending order. Positions that the rule always keeps, and
those of the queries themselves, are among them whether they can be chosen or not, so that windows, sinks and the
diagonal mean there what they mean in the whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.distributed.collectives import Group, all_parts, exchange, rank_in
from sparse_attn.distributed.layout import Layout, Span, local_places, owners, rule_of_span
from sparse_attn.ops import gathered_attention, topk_select
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.key_index import index_around
from sparse_attn.rule import Rule, check_budget
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.index_keys import rows_of
from sparse_attn.wings.reference.indexed_select import KeyBounds
from sparse_attn.wings.reference.rule import VisibleKeys

_TIMES = 8  # numbers for a pair of a query and a key, while bounds are made


def attend(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, Tk_r, D]
    value: Tensor,  # [B, Hkv, Tk_r, Dv]
    top_k: int,
    rule: Rule,
    queries: Layout,
    keys: Layout,
    group: Group,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, indices) of this rank's queries."""
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    indices, candidates = _choose(query, key, top_k, rule, queries, keys, group, backend)
    places = candidates.places(indices)
    own_key, own_value = _Chosen.apply(key, value, candidates, places)
    out, lse = gathered_attention.attend(
        query, own_key, own_value, places, scale=rule.scale, softcap=rule.softcap, sink_logits=rule.sink_logits,
        backend=backend,
    )  # fmt: skip
    return out, lse, indices


def select(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, Tk_r, D]
    top_k: int,
    rule: Rule,
    queries: Layout,
    keys: Layout,
    group: Group,
    backend: str | None,
) -> Tensor:  # int32 [B, Hq, T_r, K]
    """The indices alone."""
    query, key = autocast(query, key)
    checks.query_key(query, key)
    return _choose(query, key, top_k, rule, queries, keys, group, backend)[0]


@torch.no_grad()
def _choose(
    query: Tensor,
    key: Tensor,
    top_k: int,
    rule: Rule,
    queries: Layout,
    keys: Layout,
    group: Group,
    backend: str | None,
) -> tuple[Tensor, _Candidates]:
    if rule.share != "none":
        raise NotImplementedError(
            f"way='index' takes share='none', got {rule.share!r}: heads that share rank keys by their mass among all "
            "keys, of which 8-bit rows prove nothing; way='gather'"
        )
    if isinstance(rule.causal_offset, Tensor):
        raise NotImplementedError(
            "way='index' takes one causal_offset for all queries, got one for each, as packed sequences have them that "
            "are not causal, or have fewer queries than keys: way='gather'"
        )
    query, key, top_k = query.detach(), key.detach(), checks.top_k_of(top_k)
    check_budget(rule, top_k)
    rank = rank_in(group)
    spans = [(span, rule_of_span(rule, span, queries, keys)) for span in queries.spans(rank)]
    bounds = _gathered_index(key, keys, group)
    with torch.autocast(
        query.device.type, enabled=False
    ):  # half types would not hold the sums of whole numbers
        wanted = _possible(query, bounds, top_k, spans)
    candidates = _Candidates(wanted, key, rule, keys, group)
    found = [candidates.best(query[:, :, span.local], top_k, own, backend) for span, own in spans]
    if not found:
        shape = (*query.shape[:3], min(top_k, keys.length))
        return query.new_empty(shape, dtype=torch.int32), candidates
    return torch.cat(found, 2), candidates


def _gathered_index(key: Tensor, keys: Layout, group: Group) -> KeyBounds:
    """The rows of all keys, rounded around one shift: the mean, made of the same numbers on every rank."""
    sums = all_parts(key.float().sum(2, keepdim=True), [1] * keys.ranks, 2, group, "key index")
    shift = torch.stack(sums).sum(0).squeeze(2) / max(1, keys.length)  # [B, Hkv, D]
    index = index_around(shift, key)
    rows = rows_of(index.codes, index.bounds, index.length, key.shape[3])
    codes, numbers = (keys.whole(all_parts(part, keys.lengths, 2, group, "key index"), 2) for part in rows)
    return KeyBounds(codes, numbers, index.shift, torch.promote_types(key.dtype, torch.float32))


def _possible(
    query: Tensor, bounds: KeyBounds, top_k: int, spans: list[tuple[Span, Rule]]
) -> Tensor:  # bool [B, Hkv, Tk]
    """Which keys some query of a key head may choose, and the positions that stand between them in its rule."""
    batch, kv_heads, length = bounds.codes.shape[:3]
    wanted = torch.zeros((batch, kv_heads, length), dtype=torch.bool, device=query.device)
    for span, rule in spans:
        rows = query[:, :, span.local]
        packed = rule.packed(rows, bounds.codes, top_k)
        seen = VisibleKeys(bounds.codes, packed)
        for few in query_chunks(rows.shape[2], _TIMES * batch * rows.shape[1] * length):
            visible, forced = seen.of(few)
            free = visible & ~forced
            room = min(top_k, length) - forced.sum(-1, keepdim=True)
            left = free & (room > 0) & bounds.possible(rows[:, :, few], packed.scale, free, room)
            wanted |= left.unflatten(1, (kv_heads, -1)).any(3).any(2)
        if rule.is_causal:
            first, last = packed.causal_offset, packed.causal_offset + rows.shape[2]
            wanted[:, :, max(0, first - max(0, rule.window - 1)) : max(0, last)] = True
        if packed.key_starts is None:
            wanted[:, :, : rule.sinks] = True
        elif rule.sinks:
            starts = packed.key_starts.to(torch.int64).clamp(0, length)
            ends = (starts + rule.sinks).clamp(max=length)
            step = torch.zeros((batch, length + 1), dtype=torch.int64, device=query.device)
            step.scatter_add_(1, starts, torch.ones_like(starts))
            step.scatter_add_(1, ends, -torch.ones_like(ends))
            wanted |= (step.cumsum(1)[:, None, :length]) > 0
    return wanted


class _Candidates:
    """The wanted keys of each key head, in order, with the rows that were fetched from their owners."""

    def __init__(self, wanted: Tensor, key: Tensor, rule: Rule, keys: Layout, group: Group) -> None:
        batch, heads, self.length = wanted.shape
        self.lengths, self.group = rule.key_lengths, group
        room = max(1, int(wanted.sum(-1).max())) if wanted.numel() else 1
        b, h, position = wanted.nonzero(as_tuple=True)
        place = wanted.cumsum(-1)[b, h, position] - 1
        self.positions = position.new_full((batch, heads, room), self.length)  # [B, Hkv, U], ascending
        self.positions[b, h, place] = position
        if self.lengths is not None:  # nobody sees the others
            there = position < self.lengths.to(torch.int64)[b]
            b, h, position, place = (n[there] for n in (b, h, position, place))
        owner = owners(keys, position)
        order = owner.argsort(stable=True)
        # Of what is asked, by owner: where it goes to. Of what others ask, by who does: where it lies.
        self.at = b[order], h[order], place[order]
        self.counts = owner.bincount(minlength=keys.ranks).tolist()
        ones = [1] * keys.ranks
        counts = torch.tensor(self.counts, device=key.device)
        self.asked = exchange(counts, ones, ones, group, "requests").tolist()
        # One number names a row of a key: (position · B + b) · Hkv + h.
        names = (position * batch + b) * heads + h
        names = exchange(names[order], self.counts, self.asked, group, "requests")
        place = local_places(keys, rank_in(group), names // max(1, heads * batch))
        self.served = names // heads % max(1, batch), names % heads, place
        rows = exchange(key[self.served], self.asked, self.counts, group, "candidate keys")
        self.key = key.new_zeros((batch, heads, room, key.shape[3]))  # [B, Hkv, U, D]
        self.key[self.at] = rows

    def best(
        self,
        query: Tensor,  # [B, Hq, t, D]
        top_k: int,
        rule: Rule,
        backend: str | None,
    ) -> Tensor:  # int32 [B, Hq, t, K]
        """The choice of queries that are neighbours, by the rule for these before all keys."""
        batch, heads, room, dim = self.key.shape
        first, queries = 0, query.shape[2]
        before, most, size = self.positions.new_zeros((batch, heads)), 0, room
        if rule.is_causal:
            assert isinstance(rule.causal_offset, int)
            first = rule.causal_offset
            low = min(max(first, 0), self.length)  # from here to the last query's position nothing is missing
            before = self._until(low)
            most = int(before.max()) if before.numel() else 0
            size = max(1, most + min(max(first + queries, low), self.length) - low)
            first += most - low
        # Aligned at `low`, so that one diagonal serves all heads.
        shift = most - before if rule.is_causal else before
        at = torch.arange(size, device=query.device) - shift.unsqueeze(-1)
        inside, at = (at >= 0) & (at < room), at.clamp(0, room - 1)
        positions = torch.where(inside, self.positions.gather(2, at), self.length)  # [B, Hkv, size]
        key = self.key.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, dim))
        ends = self._until(self.length if self.lengths is None else self.lengths.to(torch.int64))
        own = Rule(
            is_causal=rule.is_causal,
            causal_offset=first if rule.is_causal else None,
            attn_mask=self._mask(rule.attn_mask, positions, query),
            key_lengths=(ends + shift).clamp(max=size).flatten(),
            window=rule.window,
            sinks=rule.sinks,
            scale=rule.scale,
            key_starts=self._starts(rule.key_starts, queries, shift),
        )
        best = topk_select.select(
            query.unflatten(1, (heads, -1)).flatten(0, 1), key.flatten(0, 1).unsqueeze(1), top_k, own, backend=backend
        )  # fmt: skip
        best = best.unflatten(0, (batch, heads))  # [B, Hkv, R, t, min(K, size)]
        found = (
            positions[:, :, None, None]
            .expand(*best.shape[:4], -1)
            .gather(-1, best.clamp(min=0).to(torch.int64))
        )
        found = torch.where(best < 0, -1, found).to(torch.int32).flatten(1, 2)
        return pad(found, (0, min(top_k, self.length) - found.shape[3]), value=-1)

    def _until(self, position: int | Tensor) -> Tensor:
        """int64 [B, Hkv]: how many lie before a position, or before each batch entry's."""
        if isinstance(position, Tensor):
            position = position.view(-1, 1, 1)
        return (self.positions < position).sum(-1)

    def _starts(self, starts: Tensor | None, queries: int, shift: Tensor) -> Tensor:
        """int64 [B · Hkv, t]: key_starts [B] or [B, t] where these lie here."""
        if starts is None:
            return shift.flatten().unsqueeze(1).expand(-1, queries)
        starts = starts.to(torch.int64).clamp(0, self.length)
        starts = starts[:, None] if starts.dim() == 1 else starts
        starts = starts[:, None].expand(*shift.shape, queries).contiguous()
        return (torch.searchsorted(self.positions, starts) + shift.unsqueeze(-1)).flatten(0, 1)

    def _mask(self, mask: Tensor | None, positions: Tensor, query: Tensor) -> Tensor | None:
        """bool [B · Hkv, R, t, size] of a mask that broadcasts to [B, Hq, t, Tk]."""
        if mask is None:
            return None
        batch, heads, size = positions.shape
        mask = mask.expand(*query.shape[:3], self.length).unflatten(1, (heads, -1))
        at = positions.clamp(max=self.length - 1)[:, :, None, None].expand(*mask.shape[:4], -1)
        return mask.gather(-1, at).flatten(0, 1)

    def places(self, indices: Tensor) -> Tensor:  # int32, likewise
        """Where the keys of indices [B, Hq, T_r, K] lie among the candidates."""
        batch, heads = self.positions.shape[:2]
        wanted = indices.to(torch.int64).reshape(batch, heads, -1)
        at = torch.searchsorted(self.positions, wanted.clamp(min=0)).view(indices.shape)
        return torch.where(indices < 0, -1, at).to(torch.int32)


class _Chosen(torch.autograd.Function):
    """(keys, values) [B, Hkv, U, …] of the candidates, values of the chosen alone; gradients go back to the owners."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, candidates: _Candidates, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = candidates
        batch, heads, room = c.positions.shape
        chosen = torch.zeros((batch, heads, room + 1), dtype=torch.bool, device=key.device)
        # An empty slot marks a place behind all others.
        at = torch.where(places < 0, room, places).to(torch.int64).reshape(batch, heads, -1)
        chosen.scatter_(2, at, torch.ones_like(at, dtype=torch.bool))
        mine = chosen[c.at]
        theirs = exchange(mine, c.counts, c.asked, c.group, "requests")
        counts = [int(part.sum()) for part in mine.split(c.counts)]
        asked = [int(part.sum()) for part in theirs.split(c.asked)]
        served, taken = tuple(n[theirs] for n in c.served), tuple(n[mine] for n in c.at)
        rows = exchange(value[served], asked, counts, c.group, "chosen values")
        own_value = value.new_zeros((batch, heads, room, value.shape[3]))
        own_value[taken] = rows
        ctx.how = served, taken, counts, asked, c.group
        ctx.shapes = key.shape, value.shape
        return c.key, own_value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        served, taken, counts, asked, group = ctx.how
        rows = torch.cat((grad_key[taken], grad_value[taken]), -1)
        rows = exchange(rows, counts, asked, group, "chosen rows, gradient")
        compute = torch.promote_types(rows.dtype, torch.float32)
        widths = [shape[3] for shape in ctx.shapes]
        grads = [
            rows.new_zeros(shape, dtype=compute)
            .index_put_(served, part.to(compute), accumulate=True)
            .to(rows.dtype)
            for shape, part in zip(ctx.shapes, rows.split(widths, -1), strict=True)
        ]
        return *grads, None, None
