"""The way of context parallelism in which queries go to the keys and choices are merged.

Each rank chooses among its own keys for all queries; the owner of a query takes the best K of all choices; each rank
attends to those of them that are its own, and the owner joins the partial outputs by their LSE:

    LSE = ln Σ_r exp(LSE_r),    out = Σ_r exp(LSE_r − LSE) · out_r

The merged indices are those of one process, bit for bit. Choices are ranked by scores in float64. A kernel's float32
score differs from that by at most (D + 3) · 2⁻²⁴ · |scale| · ‖q‖ · ‖k‖ (a sum of D products in whatever order, and the
scale), so where the K-th and the next choice are further apart than twice that, the kernel decides likewise. Where
they are not, the rows of those choices are fetched and the kernel itself decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn import checks
from sparse_attn.distributed import collectives
from sparse_attn.distributed.collectives import Group, all_parts, exchange, exchanged, gather, rank_in
from sparse_attn.distributed.layout import Layout, local_places, owners
from sparse_attn.ops import gathered_attention, topk_select
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.topk_select import ascending
from sparse_attn.rule import Rule, always_kept, check_budget, keeps

_SCORES = 1 << 24  # numbers in a piece of scores


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
    if rule.share != "none":
        raise NotImplementedError(
            f"way='merge' takes share='none', got {rule.share!r}: heads that share rank keys by their mass among all "
            "keys, which no rank has; way='gather'"
        )
    if isinstance(rule.causal_offset, Tensor):
        raise NotImplementedError(
            "way='merge' takes one causal_offset for all queries, got one for each, as packed sequences have them that "
            "are not causal, or have fewer queries than keys: way='gather'"
        )
    query, key, value = autocast(query, key, value)
    checks.query_key(query, key)
    checks.value_of(key, value)
    rank, top_k = rank_in(group), checks.top_k_of(top_k)
    first, last = _first_visible(query, rule, queries, rank), _last_visible(query, rule, queries, keys, rank)
    every = gather(query, queries, 2, group, "queries")  # [B, Hq, T, D]
    starts = rule.key_starts
    if starts is not None and starts.dim() == 2:
        starts = queries.whole(all_parts(first, queries.lengths, 1, group, "starts"), 1)  # int64 [B, T]
    with torch.no_grad():
        merge = _Merge(query.detach(), key.detach(), top_k, rule, queries, keys, group, backend)
        indices = merge.indices(every.detach(), starts, first, last)
    out, lse = _joined(every, key, value, indices, rule, queries, keys, group, backend)
    return out, lse, indices


def _last_visible(query: Tensor, rule: Rule, queries: Layout, keys: Layout, rank: int) -> Tensor:
    """int64 [B, T_r]: the last key that a query of this rank sees, if it exists."""
    batch, device = query.shape[0], query.device
    if rule.is_causal:
        assert not isinstance(rule.causal_offset, Tensor)  # context_parallel_attention takes none
        offset = checks.causal_offset_of(True, rule.causal_offset, queries.length, keys.length)
        last = (queries.positions(rank, device) + offset).expand(batch, -1)
    else:
        last = torch.full((batch, queries.lengths[rank]), keys.length - 1, device=device)
    last = last.clamp(max=keys.length - 1)
    if rule.key_lengths is not None:
        last = torch.minimum(last, rule.key_lengths.to(torch.int64)[:, None] - 1)
    return last.clamp(min=-1)


def _first_visible(query: Tensor, rule: Rule, queries: Layout, rank: int) -> Tensor:
    """int64 [B, T_r]."""
    shape = query.shape[0], queries.lengths[rank]
    if rule.key_starts is None:
        return torch.zeros(shape, dtype=torch.int64, device=query.device)
    starts = rule.key_starts.to(torch.int64).clamp(min=0)
    return (starts[:, None] if starts.dim() == 1 else starts).expand(shape).contiguous()


class _Merge:
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        top_k: int,
        rule: Rule,
        queries: Layout,
        keys: Layout,
        group: Group,
        backend: str | None,
    ) -> None:
        self.query, self.key, self.rule = query, key, rule
        self.queries, self.keys, self.group, self.rank = queries, keys, group, rank_in(group)
        self.backend, self.budget = backend, min(top_k, keys.length)
        self.scale = checks.softmax_scale(rule.scale, query.shape[3])
        check_budget(rule, top_k)
        assert not isinstance(rule.causal_offset, Tensor)  # context_parallel_attention takes none
        self.offset = checks.causal_offset_of(rule.is_causal, rule.causal_offset, queries.length, keys.length)
        self.mask: Tensor | None = None  # bool [B', H', T_r, Tk], of this rank's queries
        if rule.attn_mask is not None:
            whole = key.new_empty((key.shape[0], key.shape[1], keys.length, 0))
            mask = checks.mask_of(rule.attn_mask, query, whole, query.shape[1])
            assert mask is not None
            # As it was given: a mask for all heads travels once.
            given = (1, 1, 1, 1, *rule.attn_mask.shape)[-4:-2]
            self.mask = mask[tuple(slice(1 if n == 1 else None) for n in given)]

    def indices(
        self, every: Tensor, starts: Tensor | None, first: Tensor, last: Tensor
    ) -> Tensor:  # int32 [B, Hq, T_r, K]
        """`every` and `starts` are of all queries, `first` and `last` of this rank's."""
        mask = None if self.mask is None else self._mask_of_own_keys(self.mask)
        chosen, scores = self._own_choice(every, starts, mask)
        largest = self.key.double().square().sum(-1).sqrt().amax((0, 2)) if self.key.numel() else None
        if largest is None:
            largest = self.key.new_zeros(self.key.shape[1], dtype=torch.float64)
        self.norms = collectives.largest(largest, self.group, "bounds")  # [Hkv]
        chosen = self._toowners(chosen, "choices")  # [B, Hq, T_r, M], of keys of the whole sequence
        scores = self._toowners(scores, "choices")
        chosen, order = torch.where(chosen < 0, self.keys.length, chosen).sort(-1)
        scores = scores.gather(-1, order)
        return self._best(chosen, scores, first, last)

    def _mask_of_own_keys(self, mask: Tensor) -> Tensor:  # bool [B', H', T, Tk_r]
        """Of the masks of all queries the part before this rank's keys; eight bits travel in a byte."""
        batch, heads, mine, _ = mask.shape
        width = [-(-n // 8) for n in self.keys.lengths]
        parts = [packed_bits(self.keys.local(mask, r, 3)) for r in range(self.keys.ranks)]
        times = self.queries.lengths
        found = exchange(
            torch.cat([p.flatten() for p in parts]),
            [batch * heads * mine * w for w in width],
            [batch * heads * n * width[self.rank] for n in times],
            self.group,
            "mask",
        )
        pieces = found.split([batch * heads * n * width[self.rank] for n in times])
        rows = [p.view(batch, heads, n, width[self.rank]) for p, n in zip(pieces, times, strict=True)]
        return bits_of(self.queries.whole(rows, 2), self.keys.lengths[self.rank])

    def _own_choice(self, every: Tensor, starts: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """This rank's best keys for all queries: (which, int64, −1 for none; their scores, float64) [B, Hq, T, m].

        Without those that are always kept: these are known from positions alone.
        """
        found, scores, lengths = [], [], self.rule.key_lengths
        for span in self.keys.spans(self.rank):
            own = self.key[:, :, span.local]
            length = span.stop - span.start
            rule = Rule(
                is_causal=self.rule.is_causal,
                causal_offset=self.offset - span.start if self.rule.is_causal else None,
                key_lengths=None
                if lengths is None
                else (lengths.to(torch.int64) - span.start).clamp(0, length),
                key_starts=None if starts is None else (starts.to(torch.int64) - span.start).clamp(0, length),
                attn_mask=None if mask is None else mask[..., span.local],
                scale=self.rule.scale,
            )
            best = topk_select.select(every, own, self.budget, rule, backend=self.backend)
            found.append(torch.where(best < 0, -1, best.to(torch.int64) + span.start))
            scores.append(self._scores(every, own, best))
        if not found:
            shape = (*every.shape[:3], 0)
            return every.new_empty(shape, dtype=torch.int64), every.new_empty(shape, dtype=torch.float64)
        return torch.cat(found, -1), torch.cat(scores, -1)

    def _scores(self, query: Tensor, key: Tensor, best: Tensor) -> Tensor:
        """scale · q·k in float64 [B, Hq, T, K]; −inf for an empty slot."""
        batch, heads, length, slots = best.shape
        found = torch.full(best.shape, -torch.inf, dtype=torch.float64, device=query.device)
        step = max(1, _SCORES // max(1, batch * heads * slots * query.shape[3]))
        sharing = heads // key.shape[1]
        for start in range(0, length, step):
            rows = slice(start, start + step)
            at = best[:, :, rows].clamp(min=0).to(torch.int64)
            t = at.shape[2]
            at = at.unflatten(1, (key.shape[1], sharing)).flatten(2).unsqueeze(-1)  # [B, Hkv, R·t·K, 1]
            keys = key.gather(2, at.expand(-1, -1, -1, key.shape[3])).double()
            keys = keys.unflatten(2, (sharing, t, slots)).flatten(1, 2)  # [B, Hq, t, K, D]
            found[:, :, rows] = (keys @ query[:, :, rows].double().unsqueeze(-1)).squeeze(-1) * self.scale
        return torch.where(best < 0, -torch.inf, found)

    def _toowners(self, rows: Tensor, what: str) -> Tensor:
        """rows [B, Hq, T, m], of all queries → [B, Hq, T_r, Σ m], of this rank's, by all ranks."""
        widths = self._widths(rows.shape[-1])
        front = rows.movedim(2, 0)  # [T, B, Hq, m]
        parts = [self.queries.local(front, r, 0) for r in range(self.queries.ranks)]
        sizes = [p.numel() for p in parts]
        flat = torch.cat([p.reshape(-1) for p in parts])
        mine = self.queries.lengths[self.rank] * rows.shape[0] * rows.shape[1]
        found = exchange(flat, sizes, [mine * w for w in widths], self.group, what)
        shape = self.queries.lengths[self.rank], rows.shape[0], rows.shape[1]
        pieces = found.split([mine * w for w in widths])
        return torch.cat([p.view(*shape, w) for p, w in zip(pieces, widths, strict=True)], -1).movedim(0, 2)

    def _widths(self, own: int) -> list[int]:
        """How many choices each rank has for a query, as `_own_choice` makes them."""
        widths = [
            sum(min(self.budget, s.stop - s.start) for s in self.keys.spans(r))
            for r in range(self.keys.ranks)
        ]
        assert widths[self.rank] == own
        return widths

    def _best(self, chosen: Tensor, scores: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Of choices [B, Hq, T_r, M] in ascending order, T_k for none, and their scores, the budget's best."""
        nothing = self.keys.length
        first, last = first[:, None, :, None], last[:, None, :, None]  # [B, 1, T_r, 1]
        own = self._own_position(last)
        kept = always_kept(self.rule, first, last, own, nothing)  # [B, 1, T_r, …]
        kept = kept.expand(-1, chosen.shape[1], -1, -1)
        if self.mask is not None:
            mask = self.mask.expand(*chosen.shape[:3], nothing)
            allowed = mask.gather(-1, kept.clamp(max=nothing - 1)) if nothing else kept < 0
            kept = torch.where(allowed, kept, nothing)
        room = self.budget - (kept < nothing).sum(-1, keepdim=True)  # [B, Hq, T_r, 1]
        free = chosen < nothing
        free = free & ~keeps(self.rule, chosen, first, own)
        # Descending by score, ties in the order of keys; what is no number first, as the kernels have it.
        rank = torch.where(scores.isnan(), torch.inf, scores)
        rank = torch.where(free, rank, -torch.inf)
        best, order = rank.sort(stable=True, dim=-1, descending=True)
        valid = free.gather(-1, order)
        # Real scores of −inf and empty slots look alike: put the latter behind.
        if bool((free & (rank == -torch.inf)).any()):
            again = torch.sort((~valid).to(torch.uint8), dim=-1, stable=True)[1]
            best, order, valid = (t.gather(-1, again) for t in (best, order, valid))
        place = torch.arange(chosen.shape[-1], device=chosen.device)
        taken = valid & (place < room)
        count = valid.sum(-1, keepdim=True)
        picked = torch.where(taken, chosen.gather(-1, order), nothing)
        unsure = self._unsure(best, valid, room, count)
        picked = self._decide(unsure, chosen, free, room, picked)
        found = torch.cat((kept, picked), -1).sort(-1).values[..., : self.budget]
        return torch.where(found < nothing, found, -1).to(torch.int32).contiguous()

    def _own_position(self, last: Tensor) -> Tensor:
        """int64 [B, 1, T_r, 1]: a query's own position, whatever key_lengths hides; without order behind all keys."""
        if not self.rule.is_causal:
            return torch.full_like(last, self.keys.length)
        own = self.queries.positions(self.rank, last.device) + self.offset
        return own[None, None, :, None].expand(last.shape[0], -1, -1, -1)

    def _unsure(self, best: Tensor, valid: Tensor, room: Tensor, count: Tensor) -> Tensor:
        """bool [B, Hq, T_r]: whether rounding could change what is taken."""
        if best.shape[-1] == 0:
            return best.new_zeros(best.shape[:3], dtype=torch.bool)
        places = best.shape[-1] - 1
        inside = best.gather(-1, (room - 1).clamp(0, places)).squeeze(-1)
        outside = best.gather(-1, room.clamp(0, places)).squeeze(-1)
        norm = self.query.double().square().sum(-1).sqrt()  # [B, Hq, T_r]
        unit = 2.0**-53 if self.query.dtype == torch.float64 else 2.0**-24
        sharing = self.query.shape[1] // self.key.shape[1]
        error = (self.query.shape[3] + 3) * unit * abs(self.scale) * norm
        error = error * self.norms.repeat_interleave(sharing)[None, :, None] + 1e-44
        apart = (inside - outside) > 2 * error
        decided = (room.squeeze(-1) <= 0) | (room.squeeze(-1) >= count.squeeze(-1))
        # Where a bound is no number nothing is proven.
        return ~(decided | (apart & inside.isfinite() & error.isfinite()))

    def _decide(self, unsure: Tensor, chosen: Tensor, free: Tensor, room: Tensor, picked: Tensor) -> Tensor:
        """The unsure rows as the kernel decides them, from the rows of their keys."""
        batch, head, place = unsure.nonzero(as_tuple=True)
        candidates = torch.where(free, chosen, self.keys.length)[batch, head, place].sort(-1).values  # [n, M]
        sharing = self.query.shape[1] // self.key.shape[1]
        rows = self._fetch(candidates, batch, head // sharing)  # [n, M, D]
        if len(batch) == 0:
            return picked
        there = (candidates < self.keys.length).sum(-1)
        budgets = room.squeeze(-1)[batch, head, place]
        query = self.query[batch, head, place]
        picked = picked.clone()
        for budget in budgets.unique().tolist():
            at = (budgets == budget).nonzero().squeeze(-1)
            rule = Rule(key_lengths=there[at], scale=self.rule.scale)
            best = topk_select.select(
                query[at][:, None, None], rows[at][:, None], budget, rule, backend=self.backend
            )[:, 0, 0].to(torch.int64)
            found = candidates[at].gather(-1, best.clamp(min=0))
            found = torch.where(best < 0, self.keys.length, found)
            row = found.new_full((len(at), picked.shape[-1]), self.keys.length)
            row[:, : found.shape[1]] = found
            picked[batch[at], head[at], place[at]] = row
        return picked

    def _fetch(self, wanted: Tensor, batch: Tensor, head: Tensor) -> Tensor:
        """The rows of keys [n, M] of the whole sequence (Tk: none, zeros), each row's of one batch entry and head.

        Every rank calls it, with n = 0 too.
        """
        kv_heads, dim = self.key.shape[1], self.key.shape[3]
        n, m = wanted.shape
        # One number names a row of a key: (position · B + b) · Hkv + h.
        names = (wanted * self.key.shape[0] + batch[:, None]) * kv_heads + head[:, None]
        ask, back = names[wanted < self.keys.length].unique(return_inverse=True)
        owner = owners(self.keys, ask // (kv_heads * self.key.shape[0]))
        order = owner.argsort(stable=True)
        counts = owner.bincount(minlength=self.keys.ranks).tolist()
        asked = exchange(
            torch.tensor(counts, device=ask.device), [1] * len(counts), [1] * len(counts), self.group, "fetch"
        ).tolist()
        names = exchange(ask[order], counts, asked, self.group, "fetch")
        position = local_places(self.keys, self.rank, names // (kv_heads * self.key.shape[0]))
        given = self.key[names // kv_heads % self.key.shape[0], names % kv_heads, position]
        given = exchange(given, asked, counts, self.group, "fetch")
        table = torch.empty_like(given)
        table[order] = given
        rows = self.key.new_zeros((n, m, dim))
        rows[wanted < self.keys.length] = table[back]
        return rows


def packed_bits(mask: Tensor) -> Tensor:
    """bool […, n] → uint8 […, ⌈n / 8⌉], the first lowest."""
    eight = pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-(-mask.shape[-1] // 8), 8)).to(torch.uint8)
    return (eight << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def bits_of(packed: Tensor, length: int) -> Tensor:
    """`packed_bits` undone: bool […, length]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).bool().flatten(-2)[..., :length]


def _joined(
    every: Tensor,  # [B, Hq, T, D]
    key: Tensor,
    value: Tensor,
    indices: Tensor,  # int32 [B, Hq, T_r, K]
    rule: Rule,
    queries: Layout,
    keys: Layout,
    group: Group,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Each rank attends to its own keys for all queries; a query's owner joins what comes back."""
    rank = rank_in(group)
    chosen = queries.whole(all_parts(indices, queries.lengths, 2, group, "indices"), 2)
    local = local_places(keys, rank, chosen.to(torch.int64))
    local = ascending(torch.where(chosen < 0, -1, local)).to(torch.int32)
    part, lse = gathered_attention.attend(
        every, key, value, local, scale=rule.scale, softcap=rule.softcap, backend=backend
    )
    # One exchange for both: [T, B, Hq, Dv + 1] in float32, of half types too, for the sum is over ranks.
    compute = torch.promote_types(part.dtype, torch.float32)
    rows = torch.cat((part.to(compute), lse.to(compute).unsqueeze(-1)), -1).movedim(2, 0)
    order = torch.cat([queries.positions(r, every.device) for r in range(queries.ranks)])
    rows = rows.index_select(0, order)
    mine = queries.lengths[rank]
    found = exchanged(rows, queries.lengths, [mine] * queries.ranks, group, "partial outputs")
    found = found.unflatten(0, (queries.ranks, mine)).movedim(1, 3)  # [ranks, B, Hq, T_r, Dv + 1]
    parts, lses = found[..., :-1], found[..., -1]
    if rule.sink_logits is not None:
        sink = rule.sink_logits.to(compute)[:, None].expand(lses.shape[1:])
        lses = torch.cat((lses, sink[None]))
        parts = torch.cat((parts, torch.zeros_like(parts[:1])))
    return _join(parts, lses, part.dtype)


def _join(parts: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """parts [R, …, Dv], lses [R, …] → (out […, Dv], lse […])."""
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    # −inf − 0 has a gradient of 0, where −inf − −inf has none.
    weights = (lses - top).exp()
    total = weights.sum(0)
    some = total != 0
    safe = torch.where(some, total, 1.0)
    out = torch.where(some.unsqueeze(-1), (weights.unsqueeze(-1) * parts).sum(0) / safe.unsqueeze(-1), 0.0)
    lse = torch.where(some, safe.log() + top, -torch.inf)
    return out.to(dtype), lse.to(torch.float32)
