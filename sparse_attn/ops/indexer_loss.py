"""`indexer_loss`: how far an indexer's scores are from the attention that they stand for, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.ops.declare import Backward, Op
from sparse_attn.ops.shards import shardable
from sparse_attn.rule import Rule

_INDEX = "Tensor index_query, Tensor index_key, Tensor index_weights"
_UNITS = "Tensor unit_query, Tensor unit_key, Tensor unit_weights"


def fake(index_query, index_key, index_weights, query, key, indices, rule, *needs) -> tuple[Tensor, ...]:
    loss = query.new_empty((), dtype=torch.promote_types(query.dtype, torch.float32))
    index = index_query, index_key, index_weights
    return loss, *(t.new_empty(t.shape if n else (0,)) for t, n in zip(index, needs, strict=True))


BACKWARD = Op(
    "indexer_loss_backward",
    f"(Tensor grad_loss, {_UNITS}, {_INDEX}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_weights)",
    lambda grad_loss, *units_and_index: tuple(t.new_empty(t.shape) for t in units_and_index[:3]),
    gradient_of="indexer_loss",
)


def backward(call: Backward) -> dict[str, Any]:
    s, names = call.saved, ("index_query", "index_key", "index_weights")
    index = [getattr(s, name) for name in names]
    found = BACKWARD.on(call.wing)(call.grads.loss, s.unit_query, s.unit_key, s.unit_weights, *index)
    return {name: grad for name, grad in zip(names, found, strict=True) if call.needs[name]}


OP = Op(
    "indexer_loss",
    f"({_INDEX}, Tensor query, Tensor key, Tensor? indices, {rules.SCHEMA}, bool need_query, bool need_key, "
    f"bool need_weights) -> (Tensor loss, {_UNITS})",
    fake,
    saved="index_query index_key index_weights unit_query unit_key unit_weights",
    constant="unit_query unit_key unit_weights",
    backward=backward,
)


@shardable(
    "index_query:BHTD index_key:BHSD index_weights:BHT query:BHTD key:BHSD indices:BGTK attn_mask:BHTS key_lengths:B "
    "key_starts:B*",
    "mean",
)
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
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
) -> Tensor:
    r"""KL divergence from the attention of frozen heads to the softmax of an indexer's scores, mean over queries.

    With S_i the keys that query i sees, or those of them that `indices` names, and the mean over the attention
    heads h of the indexer's group:

    .. math:: p_{ij} = \mathrm{mean}_h\, \mathrm{softmax}_{j \in S_i}(s\, q_{hi} \cdot k_{hj}), \qquad
              \mathrm{loss} = \mathrm{mean}_i \sum_{j \in S_i} p_{ij}
              \left(\ln p_{ij} - \ln \mathrm{softmax}_{j \in S_i}(\mathrm{score}_{ij})\right)

    Without `indices` it is the dense warm-up, over all visible pairs; with the indexer's own selection it costs K
    per query. With `sink_logits` the heads' probabilities leave out what a sink takes, and their mean is made a
    distribution again: a head counts by what it gives to keys. Queries are taken in blocks and the gradients of a
    block are computed at once, so memory grows with T, never with T². Differentiable (once) in the three index
    tensors; query and key are constants.

    Args:
        index_query, index_key, index_weights: the indexer's tensors, as :func:`indexer_select` takes them.
        query: [B, Hq, Tq, D] of the attention; Hq and Hkv must be multiples of G.
        key: [B, Hkv, Tk, D]; Hq must be a multiple of Hkv.
        indices: int32 or int64 [B, G, Tq, K]: the keys that count, each once; the others do not exist. Empty slots
            are −1. With it, the mask, the lengths and causality are those that made it, and are not given again.
        is_causal, causal_offset, attn_mask, key_lengths, key_starts: as in :func:`indexer_select`.
        scale: factor of q·k of the attention, default 1/√D.
        softcap, sink_logits: of the attention, as in :func:`gathered_attention`; constants here.

    Returns:
        A float32 scalar (float64 for float64), 0 where no query sees a key.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
        NotImplementedError: forward mode or a second derivative is asked for (docs/torch_func.md says what is there).

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
    scoring: dict[str, Any] = {"scale": checks.softmax_scale(scale, query.shape[3])}
    if softcap is not None:
        scoring["softcap"] = checks.soft_cap(softcap)
    if sink_logits is not None:
        scoring["sink_logits"] = checks.sink_logits_of(sink_logits, query).detach()
    if indices is not None:
        if is_causal or any(t is not None for t in (attn_mask, key_lengths, key_starts)):
            raise ValueError(
                "indices name what each query sees: is_causal, attn_mask, key_lengths and key_starts go without"
            )
        checks.causal_offset_of(is_causal, causal_offset, query.shape[2], key.shape[2])
        indices = checks.indices_of(indices, index_query[:, :groups], index_key)
        indices = indices.expand(-1, groups, -1, -1)
        if key.shape[2] == 0:
            indices = indices[..., :0]  # empty slots all, and there is no row that they could stand for
        rule = Rule()
    else:
        rule = Rule(is_causal, causal_offset, attn_mask, key_lengths, key_starts=key_starts)
    packed = rule.packed(index_query, index_key, per_group=True)._replace(**scoring)
    index = index_query, index_key, index_weights
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in index]
    # Plain PyTorch on every device: there is no wing to choose.
    call = OP.on("reference")
    return call(*index, query.detach(), key.detach(), indices, *packed.parts(), *needs)[0]
