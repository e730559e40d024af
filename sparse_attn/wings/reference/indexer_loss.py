"""Definition of `indexer_loss`, with its gradient in the same pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.indexer_select import indexer_scores
from sparse_attn.wings.reference.rule import VisibleKeys, capped
from sparse_attn.wings.reference.topk_select import products
from sparse_attn.wings.reference.wing import implements

_INTERMEDIATES = 8  # of a block's size [B, heads, t, keys] that live at once


@implements
def indexer_loss(
    index_query: Tensor,  # [B, G·Hi, Tq, Di]
    index_key: Tensor,  # [B, G, Tk, Di]
    index_weights: Tensor,  # [B, G·Hi, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    indices: Tensor | None,  # int32 [B, G, Tq, K]: they say what is seen, not the rule
    rule: PackedRule,  # what it says of scores is of the attention's
    need_query: bool,
    need_key: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients in the three index tensors, [0] where not needed).

    Both block by block, so that nothing of a block outlives it.
    """
    inputs = (index_query, index_key, index_weights)
    wanted = [i for i, need in enumerate((need_query, need_key, need_weights)) if need]
    problem = _Divergence(query, key, indices, VisibleKeys(index_key, rule), index_key.shape[1], rule)
    grads = {i: torch.zeros_like(inputs[i], dtype=problem.compute) for i in wanted}
    total = torch.zeros((), dtype=problem.compute, device=query.device)
    count = torch.zeros((), dtype=torch.int64, device=query.device)
    whole_key = index_key.detach().to(problem.compute)
    for rows in problem.blocks(index_query.shape[1]):
        block: list[Tensor] = [
            index_query[:, :, rows].detach().to(problem.compute),
            whole_key.detach(),
            index_weights[:, :, rows].detach().to(problem.compute),
        ]
        with _autograd():
            for i in wanted:
                block[i].requires_grad_()
            loss, alive = problem.loss(block[0], block[1], block[2], rows)
            parts = torch.autograd.grad(loss, [block[i] for i in wanted]) if wanted else ()
        total += loss.detach()
        count += alive
        for i, part in zip(wanted, parts, strict=True):
            if i == 1:
                grads[1] += part
            else:
                grads[i][:, :, rows] = part
    count = count.clamp(min=1)
    nothing = index_query.new_empty((0,))
    found = [(grads[i] / count).to(t.dtype) if i in grads else nothing.clone() for i, t in enumerate(inputs)]
    return total / count, found[0], found[1], found[2]


@implements
def indexer_loss_backward(
    grad_loss: Tensor,  # []
    unit_query: Tensor,  # the gradients that the forward found, [0] where not needed
    unit_key: Tensor,
    unit_weights: Tensor,
    index_query: Tensor,  # only so that autograd knows on what the result depends
    index_key: Tensor,
    index_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of the index tensors, [0] likewise
    query, key, weights = ((g * grad_loss).to(g.dtype) for g in (unit_query, unit_key, unit_weights))
    return query, key, weights


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an op, which runs beneath it."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with (
        torch._C._ForceDispatchKeyGuard(keys[0], keys[1].remove(torch._C.DispatchKey.AutogradCPU)),
        torch.enable_grad(),
    ):
        yield


class _Divergence:
    """The constants, and the sum of the loss over a block of queries."""

    def __init__(self, query, key, indices, keys, groups, rule: PackedRule) -> None:
        self.query, self.key, self.indices, self.keys = query, key, indices, keys
        self.groups, self.rule = groups, rule
        self.compute = torch.promote_types(query.dtype, torch.float32)

    def blocks(self, index_heads: int):
        batch, heads, length = self.query.shape[:3]
        if self.indices is None:
            width = max(heads, index_heads) * self.key.shape[2]
        else:
            # Beside the scores the gathered keys, which are the larger part.
            width = (max(heads, index_heads) + self.key.shape[1] * self.key.shape[3]) * self.indices.shape[3]
        return query_chunks(length, _INTERMEDIATES * batch * max(1, width))

    def loss(self, query: Tensor, key: Tensor, weights: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(sum over the block's rows, how many rows see a key) from the indexer's tensors of those rows."""
        attention_query = self.query[:, :, rows].to(self.compute)
        attention_key = self.key.to(self.compute)
        if self.indices is None:
            seen = self.keys.of(rows)[0]  # [B, G, t, Tk]
            index_scores = indexer_scores(query, key, weights)
            scores = products(attention_query, attention_key)
        else:
            chosen = self.indices[:, :, rows]
            seen = (chosen >= 0) & (chosen < key.shape[2])  # [B, G, t, K]
            index_scores = (_products(query, key, chosen, seen).relu() * weights.unsqueeze(-1)).unflatten(
                1, (self.groups, -1)
            )
            index_scores = index_scores.sum(2)
            scores = _products(attention_query, attention_key, chosen, seen)
        alive = seen.any(-1)  # [B, G, t]
        # A row that sees nothing becomes one that sees all, and is left out of the sum: no NaN, no gradient.
        hidden = ~seen & alive.unsqueeze(-1)
        with torch.no_grad():
            scores = capped(scores * self.rule.scale, self.rule.softcap)
            scores = scores.unflatten(1, (self.groups, -1)).masked_fill_(hidden.unsqueeze(2), -torch.inf)
            mass = self._mass(scores)
        log_guess = index_scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
        terms = mass * (mass.log() - log_guess)
        terms = torch.where((mass > 0) & alive.unsqueeze(-1), terms, 0.0)  # 0 · ln 0 = 0
        return terms.sum(), alive.sum()

    def _mass(self, scores: Tensor) -> Tensor:
        """What the heads of a group give to each key, [B, G, R, t, ·] → [B, G, t, ·], together 1."""
        if self.rule.sink_logits is None:
            return scores.softmax(-1).mean(2)
        extra = self.rule.sink_logits.to(scores.dtype).view(1, self.groups, -1, 1, 1)
        beside = torch.cat((scores, extra.expand(*scores.shape[:-1], 1)), dim=-1)
        logs = beside.log_softmax(-1)[..., :-1].logsumexp(2)
        # By logarithms: what is left to keys may be very little. A row without keys is left out in the end.
        return logs.softmax(-1)


def _products(query: Tensor, key: Tensor, indices: Tensor, filled: Tensor) -> Tensor:
    """q·k of gathered keys: query [B, H, t, D], key [B, h, Tk, D], indices [B, G, t, K] → [B, H, t, K]."""
    kv_heads = key.shape[1]
    share = kv_heads // indices.shape[1]
    places = torch.where(filled, indices, 0).to(torch.int64).repeat_interleave(share, 1)  # [B, h, t, K]
    rows = key.gather(2, places.flatten(2).unsqueeze(-1).expand(-1, -1, -1, key.shape[3]))
    rows = rows.unflatten(2, places.shape[2:])  # [B, h, t, K, D]
    query = query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [B, h, t, R, D]
    return (query @ rows.transpose(-1, -2)).transpose(2, 3).flatten(1, 2)
