"""`indexer_loss`: how far an indexer's scores are from the attention that they stand for, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.rule import Rule
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.indexer_select import indexer_scores
from sparse_attn.wings.reference.rule import VisibleKeys
from sparse_attn.wings.reference.topk_select import products

_INTERMEDIATES = 8  # of a block's size [B, heads, t, keys] that live at once


def indexer_loss(
    index_query: Tensor,  # [B, G·Hi, Tq, Di]
    index_key: Tensor,  # [B, G, Tk, Di]
    index_weights: Tensor,  # [B, G·Hi, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    *,
    indices: Tensor | None = None,  # int32 [B, G, Tq, K]
    is_causal: bool = False,
    causal_offset: int | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    key_starts: Tensor | None = None,
) -> Tensor:
    r"""KL divergence from the attention of frozen heads to the softmax of an indexer's scores, mean over queries.

    With S_i the keys that query i sees, or those of them that `indices` names, and the mean over the attention
    heads h of the indexer's group:

    .. math:: p_{ij} = \mathrm{mean}_h\, \mathrm{softmax}_{j \in S_i}(s\, q_{hi} \cdot k_{hj}), \qquad
              \mathrm{loss} = \mathrm{mean}_i \sum_{j \in S_i} p_{ij}
              \left(\ln p_{ij} - \ln \mathrm{softmax}_{j \in S_i}(\mathrm{score}_{ij})\right)

    Without `indices` it is the dense warm-up, over all visible pairs; with the indexer's own selection it costs K
    per query. Queries are taken in blocks and the gradients of a block are computed at once, so memory
    grows with T, never with T². Differentiable (once) in the three index tensors; query and key are constants.

    Args:
        index_query, index_key, index_weights: the indexer's tensors, as :func:`indexer_select` takes them.
        query: [B, Hq, Tq, D] of the attention; Hq and Hkv must be multiples of G.
        key: [B, Hkv, Tk, D]; Hq must be a multiple of Hkv.
        indices: int32 or int64 [B, G, Tq, K]: the keys that count, each once; the others do not exist. Empty slots
            are −1. With it, the mask, the lengths and causality are those that made it, and are not given again.
        is_causal, causal_offset, attn_mask, key_lengths, key_starts: as in :func:`indexer_select`.
        scale: factor of q·k of the attention, default 1/√D.

    Returns:
        A float32 scalar (float64 for float64), 0 where no query sees a key.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: DeepSeek-AI, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention" (2025).

    Example:
        >>> import torch, sparse_attn
        >>> q, k = torch.randn(1, 8, 64, 16), torch.randn(1, 2, 64, 16)  # of the attention
        >>> iq, ik, w = torch.randn(1, 4, 64, 8), torch.randn(1, 1, 64, 8), torch.randn(1, 4, 64)
        >>> loss = sparse_attn.indexer_loss(iq.requires_grad_(), ik, w, q, k, is_causal=True)
        >>> loss.backward()
    """
    checks.query_key(index_query, index_key)
    index_weights = checks.indexer_weights(index_weights, index_query)
    checks.query_key(query, key)
    groups = index_key.shape[1]
    shapes = ((t.shape[0], t.shape[2]) for t in (index_query, index_key))
    if tuple(shapes) != tuple((t.shape[0], t.shape[2]) for t in (query, key)):
        raise ValueError(
            "the indexer's query and key must have the batch size and the lengths of query and key, got "
            f"{list(index_query.shape)} and {list(index_key.shape)} beside {list(query.shape)} and {list(key.shape)}"
        )
    if key.shape[1] % groups:
        raise ValueError(
            f"key heads must be a multiple of the indexer's groups, got {key.shape[1]} and {groups} groups"
        )
    is_causal = checks.boolean("is_causal", is_causal)
    scale = checks.softmax_scale(scale, query.shape[3])
    if indices is not None:
        if is_causal or any(t is not None for t in (attn_mask, key_lengths, key_starts)):
            raise ValueError(
                "indices name what each query sees: is_causal, attn_mask, key_lengths and key_starts go without"
            )
        checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2])
        indices = checks.indices_of(indices, index_query[:, :groups], index_key)
        indices = indices.expand(-1, groups, -1, -1)
        keys = None
    else:
        rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, key_starts=key_starts)
        keys = VisibleKeys(index_key, rule.packed(index_query, index_key, per_group=True))
    problem = _Divergence(query.detach(), key.detach(), indices, keys, groups, scale)
    return _Loss.apply(index_query, index_key, index_weights, problem)


class _Divergence:
    """The constants, and the sum of the loss over a block of queries."""

    def __init__(self, query, key, indices, keys, groups, scale) -> None:
        self.query, self.key, self.indices, self.keys = query, key, indices, keys
        self.groups, self.scale = groups, scale
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
            scores = (scores * self.scale).unflatten(1, (self.groups, -1))  # [B, G, R, t, ·]
            mass = scores.masked_fill_(hidden.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
        log_guess = index_scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
        terms = mass * (mass.log() - log_guess)
        terms = torch.where((mass > 0) & alive.unsqueeze(-1), terms, 0.0)  # 0 · ln 0 = 0
        return terms.sum(), alive.sum()


def _products(query: Tensor, key: Tensor, indices: Tensor, filled: Tensor) -> Tensor:
    """q·k of gathered keys: query [B, H, t, D], key [B, h, Tk, D], indices [B, G, t, K] → [B, H, t, K]."""
    kv_heads = key.shape[1]
    share = kv_heads // indices.shape[1]
    places = torch.where(filled, indices, 0).to(torch.int64).repeat_interleave(share, 1)  # [B, h, t, K]
    rows = key.gather(2, places.flatten(2).unsqueeze(-1).expand(-1, -1, -1, key.shape[3]))
    rows = rows.unflatten(2, places.shape[2:])  # [B, h, t, K, D]
    query = query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [B, h, t, R, D]
    return (query @ rows.transpose(-1, -2)).transpose(2, 3).flatten(1, 2)


class _Loss(torch.autograd.Function):
    """Forward takes block by block its loss and its gradients, so that nothing of a block outlives it."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, weights: Tensor, problem: _Divergence) -> Tensor:
        inputs = (query, key, weights)
        wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
        grads = {i: torch.zeros_like(inputs[i], dtype=problem.compute) for i in wanted}
        device = query.device.type
        total = torch.zeros((), dtype=problem.compute, device=query.device)
        count = torch.zeros((), dtype=torch.int64, device=query.device)
        with torch.autocast(device, enabled=False):
            whole_key = key.detach().to(problem.compute)
            for rows in problem.blocks(query.shape[1]):
                block: list[Tensor] = [
                    query[:, :, rows].detach().to(problem.compute),
                    whole_key.detach(),
                    weights[:, :, rows].detach().to(problem.compute),
                ]
                for i in wanted:
                    block[i].requires_grad_()
                with torch.enable_grad():
                    loss, alive = problem.loss(block[0], block[1], block[2], rows)
                total += loss.detach()
                count += alive
                if not wanted:
                    continue
                parts = torch.autograd.grad(loss, [block[i] for i in wanted])
                for i, part in zip(wanted, parts, strict=True):
                    if i == 1:
                        grads[1] += part
                    else:
                        grads[i][:, :, rows] = part
        count = count.clamp(min=1)
        saved = [None if i not in grads else (grads[i] / count).to(inputs[i].dtype) for i in range(3)]
        ctx.save_for_backward(*saved)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors), None
