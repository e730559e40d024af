"""Tensor parallelism: attention modules whose heads lie on several ranks, and selections that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparse_attn import checks
from sparse_attn.distributed.collectives import Group, all_parts, exchange, rank_in, size_of, summed
from sparse_attn.distributed.layout import Layout, rule_of_span
from sparse_attn.nn import HybridAttention, Indexer, TopKAttention
from sparse_attn.ops import topk_select
from sparse_attn.ops.arguments import autocast
from sparse_attn.ops.shards import refuse_context
from sparse_attn.rule import Rule
from sparse_attn.selection import Exact, LowRank, Selection
from sparse_attn.selection.selection import check_rule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.rule import VisibleKeys, attention_mass, best_of, capped
from sparse_attn.wings.reference.topk_select import products

SHARINGS = ("rows", "masses", "rank")


@dataclass(frozen=True)
class AcrossRanks:
    """A selector: one selection by true q·k of heads that lie on several ranks, the same on each.

    A key's rank is its attention mass summed over the heads of all ranks, as in one process with ``share="all"``, which
    the rule must say. It goes wherever a selector goes (`nn.TopKAttention`, `configure(model, selector=…)` of a Hugging
    Face model under its tensor-parallel plan).

    Args:
        group: the ranks that have the heads, in the order of the heads; None is the default group. Where they have the
            query heads of one key head each, the selection is that of share="kv".
        way: "rows": each rank gets all heads of its share of the queries, selects for these, and the indices are
            gathered: bit for bit the selection of one process, for bytes that grow with T. "masses": each rank sums the
            masses of its own heads, a tile of queries at a time, and the sums are all-reduced: equal up to the rounding
            of sums in another order, for bytes that grow with T². "rank": the heads of rank `source` choose for all.
        source: of way="rank", within the group.

    Example:
        attention.token_selector = AcrossRanks(mesh.get_group())
    """

    group: Group = None
    way: str = "rows"
    source: int = 0
    backend: str | None = None
    across_ranks = True

    def __post_init__(self) -> None:
        if self.way not in SHARINGS:
            raise ValueError(
                f"way must be one of {', '.join(map(repr, SHARINGS))}, got {checks.describe(self.way)}"
            )
        checks.integer("source", self.source, 0)

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Selection:
        """query [B, Hq / ranks, Tq, D], key [B, Hkv / ranks, Tk, D] → indices [B, 1, Tq, K], the same on every rank."""
        refuse_context("a selection of heads on several ranks")
        query, key = autocast(query, key)
        checks.query_key(query, key)
        if check_rule(rule).share != "all":
            raise ValueError(f"AcrossRanks is one selection of all heads: share='all', got {rule.share!r}")
        if rule.attn_mask is not None and rule.attn_mask.dim() > 2 and rule.attn_mask.shape[-3] != 1:
            raise ValueError("attn_mask must be the same for heads that share: [B, 1, Tq, Tk]")
        query, key = query.detach(), key.detach()
        if self.way == "rank":
            return Selection(self._of_one(query, key, top_k, rule))
        if self.way == "masses":
            with torch.autocast(query.device.type, enabled=False):  # scores are float32, as in a kernel
                return Selection(self._by_masses(query, key, top_k, rule))
        return Selection(self._by_rows(query, key, top_k, rule))

    def _of_one(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Tensor:
        checks.integer("source", self.source, 0, size_of(self.group) - 1)
        if rank_in(self.group) == self.source:
            indices = topk_select.select(query, key, top_k, rule, backend=self.backend).contiguous()
        else:
            shape = query.shape[0], 1, query.shape[2], min(checks.top_k_of(top_k), key.shape[2])
            indices = query.new_empty(shape, dtype=torch.int32)
        dist.broadcast(indices, group=self.group, group_src=self.source)
        return indices

    def _by_rows(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Tensor:
        ranks, rank = size_of(self.group), rank_in(self.group)
        rows = Layout.even(query.shape[2], ranks)
        keys = torch.cat(all_parts(key, [key.shape[1]] * ranks, 1, self.group, "keys of all heads"), 1)
        # [Tq, B, H, D]: the rows of the first rank come first.
        front = query.movedim(2, 0)
        own = rows.lengths[rank]
        found = exchange(front.contiguous(), rows.lengths, [own] * ranks, self.group, "queries of all heads")
        # [ranks, own, B, H, D] → [B, ranks·H, own, D]
        queries = found.unflatten(0, (ranks, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        if rule.sink_logits is not None:
            logits = all_parts(
                rule.sink_logits.detach(), [query.shape[1]] * ranks, 0, self.group, "sink logits"
            )
            rule = replace(rule, sink_logits=torch.cat(logits))
        span = next(iter(rows.spans(rank)), None)
        if span is None:
            shape = query.shape[0], 1, 0, min(checks.top_k_of(top_k), key.shape[2])
            indices = query.new_empty(shape, dtype=torch.int32)
        else:
            whole = Layout.contiguous([query.shape[2]]), Layout.contiguous([key.shape[2]])
            part = rule_of_span(rule, span._replace(at=span.start), *whole)
            indices = topk_select.select(queries, keys, top_k, part, backend=self.backend)
        return rows.whole(all_parts(indices, rows.lengths, 2, self.group, "indices"), 2)

    def _by_masses(self, query: Tensor, key: Tensor, top_k: int, rule: Rule) -> Tensor:
        """The definition of `topk_select`, with the sum over the ranks in its middle."""
        packed = rule.packed(query, key, top_k)
        batch, heads, length = query.shape[:3]
        budget = min(checks.top_k_of(top_k), key.shape[2])
        indices = query.new_empty((batch, 1, length, budget), dtype=torch.int32)
        keys = key.to(torch.promote_types(query.dtype, torch.float32))
        visible_keys = VisibleKeys(key, packed)
        for rows in query_chunks(length, batch * heads * key.shape[2]):
            scores = capped(products(query[:, :, rows].to(keys.dtype), keys) * packed.scale, packed.softcap)
            visible, forced = visible_keys.of(rows)
            mass = attention_mass(scores.unsqueeze(1), visible, packed.sink_logits)
            mass = summed(mass, self.group, "masses")
            indices[:, :, rows] = best_of(mass, visible, forced, budget)
        return indices


def tensor_parallel(model: torch.nn.Module, mesh: DeviceMesh, *, way: str = "rows") -> torch.nn.Module:
    """Splits the heads of each :class:`sparse_attn.nn.TopKAttention` of `model` over the ranks of `mesh`, in place.

    The projections `qkv.query`, `qkv.key`, `qkv.value` become ColwiseParallel, `out` RowwiseParallel: hidden states are
    the same on every rank, before and after. A selection of all heads (share="all") is made over the ranks
    (:class:`AcrossRanks`); an :class:`~sparse_attn.nn.Indexer` of one group is replicated, one with a group per key
    head is split with them. What is not attention is left alone (`parallelize_module` splits an MLP).

    Args:
        model: with TopKAttention modules, or one itself; the same weights on every rank.
        mesh: of one dimension, which must divide num_kv_heads.
        way: of :class:`AcrossRanks`, where share="all".

    Returns:
        the model.

    Raises:
        ValueError: a module whose heads the mesh does not divide, or whose selector needs all heads in one place;
            nothing is changed then.

    Example:
        model = tensor_parallel(model, init_device_mesh("cpu", (2,)))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {checks.describe(model)}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {checks.describe(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension (mesh['tensor'] of several), got {mesh.ndim}")
    layers = [(name or "model", m) for name, m in model.named_modules() if isinstance(m, TopKAttention)]
    if not layers:
        raise ValueError("model must have modules of class sparse_attn.nn.TopKAttention, got none")
    across = AcrossRanks(mesh.get_group(), way)
    for name, layer in layers:
        _refuse(name, layer, mesh.size())
    for _, layer in layers:
        columns = dict.fromkeys(("qkv.query", "qkv.key", "qkv.value"), ColwiseParallel())
        plan: dict[str, Any] = {**columns, "out": RowwiseParallel()}
        selector = layer.token_selector
        if isinstance(selector, Indexer) and selector.groups > 1:
            plan.update({f"token_selector.{part}": ColwiseParallel() for part in ("query", "key", "weight")})
        parallelize_module(layer, mesh, plan)
        if layer.sink_logits is not None:
            split = distribute_tensor(layer.sink_logits.detach(), mesh, [Shard(0)])
            layer.sink_logits = torch.nn.Parameter(split, requires_grad=layer.sink_logits.requires_grad)
        if layer.share == "all" and not isinstance(selector, Indexer):
            layer.token_selector = replace(across, backend=layer.backend)
    return model


def _refuse(name: str, layer: TopKAttention, ranks: int) -> None:
    if isinstance(layer, HybridAttention) and layer.approximated_heads:
        raise ValueError(
            f"{name}: networks of approximated heads are of all heads, and are not split over ranks"
        )
    if layer.num_kv_heads % ranks:
        raise ValueError(
            f"{name} has {layer.num_kv_heads} key heads and {layer.num_heads} query heads, which {ranks} ranks do not "
            "divide"
        )
    selector = layer.token_selector
    if isinstance(selector, LowRank):
        raise ValueError(
            f"{name}: a LowRank selector has components for all heads, and is not split over ranks"
        )
    if isinstance(selector, Indexer):
        if selector.groups > 1 and selector.groups % ranks:
            raise ValueError(
                f"{name}: its indexer has {selector.groups} groups, which {ranks} ranks do not divide"
            )
    elif layer.share == "all" and selector is not None and not isinstance(selector, (Exact, AcrossRanks)):
        raise ValueError(
            f"{name}: share='all' is one selection of all heads, which {type(selector).__name__} would make of a "
            "rank's own: the exact selector sums over the ranks"
        )
