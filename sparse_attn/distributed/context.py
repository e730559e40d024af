"""Context parallelism: the positions of a sequence lie on several ranks.

Three ways. **Keys come to the queries** (`over_ranks`): keys and values are gathered, queries stay. **Queries go to the
keys** (merge.py): each rank chooses among its own keys, the choices are merged, and partial outputs are joined by
their LSE. **8-bit rows of the keys come to the queries** (index.py), and of keys and values what these leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks.packed import documents
from sparse_attn.distributed import fetch, index, merge
from sparse_attn.distributed.collectives import Group, gather, rank_in, size_of
from sparse_attn.distributed.layout import Layout, Span, rule_of_span
from sparse_attn.ops import gathered_attention, topk_attention, topk_select
from sparse_attn.ops.shards import Shardable, state
from sparse_attn.rule import Rule

WAYS = ("gather", "merge", "index")
WAYS_INSIDE = ("gather", "merge", "index", "fetch")  # of context_parallel
WAYS_TO_INDICES = ("fetch", "gather")


def over_ranks(
    call: Shardable, arguments: dict[str, Any], queries: Layout, keys: Layout, group: Group
) -> Any:
    """`call`, of which this rank has its queries and its keys: keys are gathered, results are of its queries.

    Of the rule, what is per query is of this rank's queries, and what is per key of all keys. Indices are global.
    """
    axes = call.axes
    if _is_packed(call) or call.results == ("mean",):
        raise NotImplementedError(
            f"{call.name} takes sequences whole: losses over all positions are not split over ranks, nor blocks of "
            "packed sequences"
        )
    tile = tile_of(call, arguments)
    _check_tiles(call, arguments, tile, queries)
    _refuse_key_index(arguments.get("key_index"))
    rank = rank_in(group)
    lead, lead_axes = next((arguments[n], a) for n, a in axes.items() if a)
    _fits("query", lead.shape[lead_axes.index("T")], queries, rank)
    arguments = dict(arguments)
    for name, letters in axes.items():
        value, at = arguments.get(name), letters.find("S")
        if isinstance(value, Tensor) and at >= 0 and "mask" not in name:
            _fits(name, value.shape[at], keys, rank)
            arguments[name] = gather(value, keys, at, group, name)
    rule = arguments.get("rule")
    outside = _alone()
    found = []
    with outside:
        for span in queries.spans(rank) or [Span(0, 0, 0)]:
            part = {
                name: _rows(value, axes.get(name, ""), span, tile) if isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
            if isinstance(rule, Rule):
                part["rule"] = rule_of_span(rule, span, queries, keys)
            if _chooses_blocks(call) and arguments.get("is_causal"):
                offset = checks.causal_offset_of(
                    True, arguments.get("causal_offset"), queries.length, keys.length
                )
                part["causal_offset"] = span.start + offset
            among = arguments.get("among")
            if among is not None:
                part["among"] = among._replace(blocks=_rows(among.blocks, "BGNM", span, tile))
            found.append(call.function(**part))
    if len(found) == 1:
        return found[0]
    if isinstance(found[0], Tensor):
        return torch.cat(found, _along_queries(call.results[0]))
    results = zip(*found, strict=True)
    return tuple(torch.cat(r, _along_queries(a)) for r, a in zip(results, call.results, strict=True))


def _is_packed(call: Shardable) -> bool:
    return "query" in call.axes and "B" not in call.axes["query"]


def _of_blocks(call: Shardable) -> bool:
    return any("N" in axes for axes in (*call.axes.values(), *call.results))


def tile_of(call: Shardable, arguments: dict[str, Any]) -> int:
    """How many queries have a row of blocks together; 1 of calls without blocks."""
    if arguments.get("among") is not None:
        tile = arguments["among"].query_tile
    elif "query_tile" in inspect.signature(call.function).parameters:
        tile = arguments.get("query_tile", inspect.signature(call.function).parameters["query_tile"].default)
    else:
        return 1
    return int(checks.integer("query_tile", tile, 1))


def _chooses_blocks(call: Shardable) -> bool:
    return "N" in call.results[0]


def _check_tiles(call: Shardable, arguments: dict[str, Any], tile: int, queries: Layout) -> None:
    """Blocks are chosen for whole tiles of queries."""
    if _chooses_blocks(call) and arguments.get("key_starts") is not None:
        raise NotImplementedError(
            f"{call.name} over ranks takes no key_starts and no documents: blocks are pooled from the first start of "
            "all queries on, and a rank has some of them"
        )
    edges = {at for own in queries.ranges for start, stop in own if start < stop for at in (start, stop)}
    inside = sorted(at for at in edges if at % tile and at != queries.length)
    if inside:
        raise ValueError(
            f"blocks are chosen for tiles of {tile} queries, which must not be split: each range of the layout must "
            f"begin at a multiple of {tile}, got one that begins at {inside[0]}"
        )


def _along_queries(axes: str) -> int:
    return max(axes.find("T"), axes.find("N"))


def _refuse_key_index(given: object) -> None:
    if given is not None:
        raise ValueError("key_index is of one process's keys: leave it out of a call over several ranks")


@contextmanager
def _alone() -> Iterator[None]:
    """What a call over ranks calls itself is of this process."""
    before = state.context, checks.attention.Served.over_ranks
    state.context, checks.attention.Served.over_ranks = None, True
    try:
        yield
    finally:
        state.context, checks.attention.Served.over_ranks = before


def _rows(value: Tensor, axes: str, span: Span, tile: int) -> Tensor:
    """What belongs to the queries of a span: the queries, or a row for each tile of them."""
    length = span.stop - span.start
    if "T" in axes:
        return value.narrow(axes.index("T"), span.at, length)
    if "N" in axes:
        return value.narrow(axes.index("N"), span.at // tile, -(-length // tile))
    return value


def _layouts(layout: object, key_layout: object, group: Group) -> Layout:
    """The layout of the keys."""
    keys = layout if key_layout is None else key_layout
    for name, each in (("layout", layout), ("key_layout", keys)):
        if not isinstance(each, Layout):
            raise TypeError(f"{name} must be a sparse_attn.distributed.Layout, got {checks.describe(each)}")
        if each.ranks != size_of(group):
            raise ValueError(f"{name} must be of the group's {size_of(group)} ranks, got one of {each.ranks}")
    assert isinstance(keys, Layout)
    return keys


def _one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {checks.describe(value)}")


def _fits(name: str, length: int, layout: Layout, rank: int) -> None:
    if layout.lengths[rank] != length:
        raise ValueError(
            f"{name} must have the {layout.lengths[rank]} positions that the layout gives to rank {rank}, got {length}"
        )


def documents_of(cu_seq: Tensor, layout: Layout, rank: int) -> tuple[Tensor, Tensor]:  # int64 [1, T_r] each
    """Where the document of each of the rank's positions begins, and ends; behind all it begins at T."""
    bounds = documents(cu_seq, layout.length)
    positions = layout.positions(rank, bounds.device)
    if len(bounds) == 1:
        nothing = torch.full_like(positions, layout.length)[None]
        return nothing, nothing
    at = torch.bucketize(positions, bounds[1:], right=True).clamp(max=len(bounds) - 2)
    starts = torch.where(positions < bounds[-1], bounds[at], layout.length)
    return starts[None], bounds[at + 1][None]


def _packed_rule(rule: Rule, cu_seq: Tensor | None, layout: Layout, rank: int) -> Rule:
    if cu_seq is None:
        return rule
    if rule.key_starts is not None:
        raise ValueError("cu_seq says where keys start: key_starts goes without it")
    if rule.causal_offset not in (None, 0):
        raise ValueError("cu_seq is of queries and keys alike: causal_offset goes without it")
    starts, ends = documents_of(cu_seq, layout, rank)
    if rule.is_causal:
        return replace(rule, key_starts=starts)
    checks.kept(rule.window, rule.sinks, rule.is_causal)
    # Each query sees its document to the end, by an offset of its own.
    offset = ends - 1 - layout.positions(rank, ends.device)
    return replace(rule, is_causal=True, causal_offset=offset, key_starts=starts)


def context_parallel_attention(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, Tk_r, D]
    value: Tensor,  # [B, Hkv, Tk_r, Dv]
    top_k: int,
    *,
    layout: Layout,
    key_layout: Layout | None = None,
    group: Group = None,
    way: str = "gather",
    cu_seq: Tensor | None = None,  # int [S + 1]
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
    **rule: Any,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`sparse_attn.topk_attention` of a sequence whose positions lie on the ranks of `group`.

    Every rank calls it with its own part of queries, keys and values. The result is what one process would have for
    this rank's queries: indices bit for bit, ties included, counted over the whole sequence.

    Args:
        query, key, value: this rank's positions, in the order of the layout; a rank may have none.
        layout: of the queries, and of the keys where key_layout is None.
        key_layout: of keys and values, as in decoding, where queries are few.
        group: the ranks; None is the default group.
        way: "gather" brings all keys and values here and leaves the queries; "merge" sends the queries to where the
            keys are, merges each rank's choice, and joins the partial outputs: fewer bytes where queries are few;
            "index" brings the 8-bit rows of a :class:`sparse_attn.KeyIndex` of all keys here, then the keys that may be
            chosen by some query, and the values of the chosen (docs/distributed.md has the numbers). "merge" and
            "index" take share="none".
        cu_seq: int32 or int64 [S + 1], the same on every rank: packed documents (B = 1) over the whole sequence, which
            may cross the ranks' boundaries; without is_causal each is seen whole, with way="gather" alone. First keys
            that are always kept are each document's own.
        rule: the parts of a :class:`sparse_attn.selection.Rule`, which are those arguments of topk_attention. A
            causal_offset is a number: query i of the whole sequence sees keys 0 … i + offset. key_lengths [B] is over
            the whole sequence, an attn_mask of this rank's queries and all keys, key_starts [B] or [B, T_r].
        top_k, return_lse, return_indices, backend: as there.

    Returns:
        as :func:`sparse_attn.topk_attention`, of this rank's queries: out [B, Hq, T_r, Dv], lse, indices
        [B, G, T_r, min(top_k, Tk)].

    Gradients: dQ is local, dK and dV are sums over the ranks that come back to where the keys are. Every rank must call
    backward. The gradient of sink_logits is of this rank's queries: it is summed as any replicated parameter's.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message; raised on the ranks where it is wrong, while the
            others wait for them until the group's timeout.
        NotImplementedError: what the way does not do.

    Example:
        out = context_parallel_attention(q, k, v, 64, layout=Layout.zigzag(T, ranks), is_causal=True)
    """
    keys = _layouts(layout, key_layout, group)
    _one_of("way", way, WAYS)
    with _alone():
        checks.query_key(query, key)
        checks.value_of(key, value)
    return_lse = checks.boolean("return_lse", return_lse)
    return_indices = checks.boolean("return_indices", return_indices)
    parts = [part.name for part in fields(Rule)]
    for name in rule:
        if name not in parts:
            raise TypeError(
                f"context_parallel_attention takes no {name}: it has the arguments of topk_attention that are parts of "
                f"the rule ({', '.join(parts)})"
            )
    said = Rule(**rule)
    if isinstance(said.causal_offset, Tensor):
        raise NotImplementedError(
            "a causal_offset over ranks is a number: key_starts and cu_seq say where keys start"
        )
    if cu_seq is not None and keys.length != layout.length:
        raise ValueError("cu_seq is of queries and keys alike: key_layout must be as long as layout")
    said = _packed_rule(said, cu_seq, layout, rank_in(group))
    arguments = {"query": query, "key": key, "value": value, "top_k": top_k, "rule": said, "backend": backend}
    if way == "gather":
        out, lse, indices = over_ranks(_ATTEND, arguments, layout, keys, group)
    else:
        rank = rank_in(group)
        _fits("query", query.shape[2], layout, rank)
        _fits("key", key.shape[2], keys, rank)
        with _alone():
            out, lse, indices = _ATTEND_BY[way](query, key, value, top_k, said, layout, keys, group, backend)
    found = (out, *((lse,) if return_lse else ()), *((indices,) if return_indices else ()))
    return found if len(found) > 1 else found[0]


_ATTEND = topk_attention.attend_best.shardable  # type: ignore[attr-defined]
_ATTEND_BY = {"merge": merge.attend, "index": index.attend}
_SELECT = topk_select.select.shardable  # type: ignore[attr-defined]
_TO_INDICES = gathered_attention.attend.shardable  # type: ignore[attr-defined]


def context_parallel_gathered_attention(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, Tk_r, D]
    value: Tensor,  # [B, Hkv, Tk_r, Dv]
    indices: Tensor,  # int32 [B, G, T_r, K]
    *,
    layout: Layout,
    key_layout: Layout | None = None,
    group: Group = None,
    way: str = "fetch",
    scale: float | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`sparse_attn.gathered_attention` of a sequence whose positions lie on the ranks of `group`.

    For a choice that was made from little: an indexer's, whose index keys alone are gathered.

    Args:
        query, key, value, layout, key_layout, group: as in :func:`context_parallel_attention`.
        indices: of this rank's queries, counted over the whole sequence.
        way: "fetch" asks the other ranks for the rows that this rank's queries chose, each once for all heads; "gather"
            brings all keys and values here. The first sends less where a rank's queries choose few of all keys.
        scale, return_lse, softcap, sink_logits, backend: as there.

    Returns:
        out [B, Hq, T_r, Dv]; with return_lse (out, lse). Gradients as there.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
    """
    keys = _layouts(layout, key_layout, group)
    _one_of("way", way, WAYS_TO_INDICES)
    with _alone():
        checks.query_key(query, key)
        checks.value_of(key, value)
        indices = checks.indices_of(indices, query, key)
    return_lse = checks.boolean("return_lse", return_lse)
    scoring: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
        "backend": backend,
    }
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "indices": indices, **scoring}
    _fits("query", query.shape[2], layout, rank_in(group))
    _fits("key", key.shape[2], keys, rank_in(group))
    if way == "fetch":
        with _alone():
            out, lse = fetch.attend(**arguments, keys=keys, group=group)
    else:
        out, lse = over_ranks(_TO_INDICES, arguments, layout, keys, group)
    return (out, lse) if return_lse else out


@dataclass(frozen=True, eq=False)
class _Inside:
    """What a call becomes inside of `context_parallel`."""

    layout: Layout
    group: Group
    cu_seq: Tensor | None  # int [S + 1]
    way: str
    of_pack: bool = False  # a packed call is under way, and its rule is of this rank's queries already

    @property
    def documents(self) -> bool:
        return self.cu_seq is not None

    def tokens(self, device: torch.device) -> tuple[int, Tensor]:
        return self.layout.length, self.layout.positions(rank_in(self.group), device)

    def packed(self, call: Shardable, arguments: dict[str, Any]) -> Any:
        """A call with cu_seq of its own: it says where sequences lie among the tokens of all ranks."""
        if self.documents:
            raise ValueError(
                f"{call.name} has a cu_seq of its own: context_parallel goes without cu_seq then"
            )
        if arguments.get("block_table") is not None:
            raise NotImplementedError("pages (block_table) are not split over ranks: call it outside")
        before, state.context = state.context, replace(self, of_pack=True)
        try:
            return call.function(**arguments)
        finally:
            state.context = before

    def __call__(self, call: Shardable, positional: tuple, options: dict[str, Any]) -> Any:
        arguments = dict(inspect.signature(call.function).bind(*positional, **options).arguments)
        if "tables" in call.axes:  # a token's own: nothing of other positions
            with _alone():
                return call.outside(*positional, **options)
        if _is_packed(call) and not _of_blocks(call):
            return self.packed(call, arguments)
        if isinstance(arguments.get("rule"), Rule):
            arguments["rule"] = self._rule(arguments["rule"])
        elif _chooses_blocks(call):
            given: dict[str, Any] = {
                name: arguments.get(name) for name in ("key_lengths", "key_starts", "causal_offset")
            }
            said = self._rule(Rule(bool(arguments.get("is_causal")), **given))
            arguments["key_starts"] = said.key_starts
        function, layout, group = call.function, self.layout, self.group
        if function is _ATTEND.function and self.way in _ATTEND_BY:
            return self._by_way(_ATTEND_BY[self.way], arguments)
        tokens = not arguments.get("rounded") and arguments.get("among") is None
        if function is _SELECT.function and self.way == "index" and tokens:
            return self._by_way(index.select, arguments)
        if function is _TO_INDICES.function and self.way in ("fetch", "index"):
            with _alone():
                return fetch.attend(**arguments, keys=layout, group=group)
        return over_ranks(call, arguments, layout, layout, group)

    def _rule(self, rule: Rule) -> Rule:
        if self.of_pack:
            return rule
        unknown = {"attn_mask", "key_lengths", "key_starts", "causal_offsets"}
        if rule.said() & unknown or rule.causal_offset:
            raise NotImplementedError(
                "inside context_parallel a rank does not know whose positions a mask, key_lengths, key_starts or a "
                "causal_offset mean: cu_seq says where documents are, context_parallel_attention takes the rest"
            )
        return _packed_rule(rule, self.cu_seq, self.layout, rank_in(self.group))

    def _by_way(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        arguments = dict(arguments)
        backend = arguments.pop("backend", None)
        _refuse_key_index(arguments.pop("key_index", None))
        for name in ("function", "rounded", "among"):
            arguments.pop(name, None)
        rank = rank_in(self.group)
        for name in ("query", "key"):
            _fits(name, arguments[name].shape[2], self.layout, rank)
        with _alone():
            return function(
                **arguments, queries=self.layout, keys=self.layout, group=self.group, backend=backend
            )


def over_positions(
    call: Shardable, arguments: dict[str, Any], queries: Layout, keys: Layout, group: Group
) -> Any:
    """`over_ranks`, of packed sequences too where queries and keys are the same tokens."""
    if _is_packed(call) and not _of_blocks(call):
        if queries != keys:
            raise NotImplementedError(
                f"{call.name} over ranks has as many keys as queries, got {keys.length} and {queries.length}"
            )
        return _Inside(queries, group, None, "gather").packed(call, arguments)
    return over_ranks(call, arguments, queries, keys, group)


@contextmanager
def context_parallel(
    layout: Layout, group: Group = None, *, cu_seq: Tensor | None = None, way: str = "gather"
) -> Iterator[None]:
    """Inside, this package's attention takes its tensors for this rank's part of a sequence.

    A model runs as it is on its part: :func:`sparse_attn.topk_attention`, :func:`~sparse_attn.topk_select`,
    :func:`~sparse_attn.gathered_attention` (indices are global), the selectors of tokens and
    :class:`sparse_attn.nn.TopKAttention` with a top_k work over all ranks. Positions (rotary or learned) are the
    caller's: `layout.positions(rank)`. The loss is of this rank's tokens. Backward belongs inside too where parts are
    computed again (torch.utils.checkpoint). Inside torch's `context_parallel`, which shards the buffers, the layout is
    `Layout.zigzag` where it balances load, as it does by default.

    Args:
        layout: which positions this rank has.
        group: the ranks; None is the default group.
        cu_seq: packed documents over the whole sequence, as in :func:`context_parallel_attention`.
        way: of topk_attention, "gather", "merge" or "index" as there; other selections gather keys (an indexer's its
            index keys), and with "index" topk_select does not. With "fetch" attention to what a selector chose asks for
            the chosen rows alone (:func:`context_parallel_gathered_attention`), and topk_attention gathers; so it does
            with "index".

    Raises:
        NotImplementedError: inside, by a call that looks at whole sequences.

    Example:
        with context_parallel(Layout.zigzag(T, ranks), group):
            model.loss(ids_here, targets_here).backward()
    """
    _layouts(layout, None, group)
    _one_of("way", way, WAYS_INSIDE)
    if cu_seq is not None:
        documents(cu_seq, layout.length)

    before, state.context = state.context, _Inside(layout, group, cu_seq, way)
    try:
        yield
    finally:
        state.context = before
