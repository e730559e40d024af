"""Definition of `gathered_attention` and of its gradient."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.rule import capped
from sparse_attn.wings.reference.wing import implements


def _rows_of(indices: Tensor, heads: int, kv_heads: int, key_length: int) -> tuple[Tensor, Tensor]:
    """Flat rows of key.flatten(0, 2), int64 [B, Hq, t, K] (0 for an empty slot), and which slots are filled."""
    batch, groups = indices.shape[:2]
    indices = indices.repeat_interleave(heads // groups, dim=1)
    filled = (indices >= 0) & (indices < key_length)
    base = torch.arange(batch, device=indices.device).view(-1, 1) * kv_heads
    base = base + torch.arange(heads, device=indices.device) // (heads // kv_heads)  # [B, Hq]
    rows = base.unsqueeze(-1).unsqueeze(-1) * key_length + indices.to(torch.int64)
    return torch.where(filled, rows, 0), filled


def _scores(query: Tensor, keys: Tensor, filled: Tensor, scale: float, softcap: float) -> Tensor:
    """scale · q·k, capped, of the filled slots, −inf elsewhere: [B, Hq, t, K]."""
    scores = capped((keys @ query.unsqueeze(-1)).squeeze(-1) * scale, softcap)
    return torch.where(filled, scores, -torch.inf)


def softmax(
    scores: Tensor,  # [..., K]
    sink_logits: Tensor | None,  # one more logit, broadcastable to [..., 1]
) -> tuple[Tensor, Tensor]:  # [..., K], [...]
    """(probabilities, LSE); a row with nothing to attend to has probabilities 0 and LSE −inf, or the sink's."""
    width = scores.shape[-1]
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    lse = scores.logsumexp(-1)
    # Not exp(scores − lse): the rounding of a large LSE would be a factor on the whole row.
    probabilities = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, scores.softmax(-1))
    return probabilities[..., :width], lse


def cap_slopes(scores: Tensor, softcap: float) -> Tensor | float:
    """d capped / d score = 1 − (capped / softcap)²."""
    return 1.0 - (scores / softcap).square() if softcap else 1.0


def sink_share(sink: Tensor, lse: Tensor) -> Tensor:
    """exp(sink − LSE): what a sink has of the probability. Where nothing weighs anything the LSE is −inf."""
    return torch.where(lse == -torch.inf, 0.0, (sink - lse).exp())


def lse_along_nothing(query: Tensor, sink_move: Tensor | None) -> Tensor:
    """float32 [B, Hq, Tq]: the tangent of `lse_of_nothing`."""
    move = query.new_zeros(query.shape[1], dtype=torch.float32) if sink_move is None else sink_move.float()
    return move.unsqueeze(-1).expand(query.shape[:3])


def lse_of_nothing(query: Tensor, sink_logits: Tensor | None) -> Tensor:
    """float32 [B, Hq, Tq], of queries that attend to no key."""
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    return lse if sink_logits is None else lse.copy_(sink_logits.unsqueeze(-1).expand_as(lse))


@implements
def gathered_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    scale: float,
    softcap: float,  # 0: none
    sink_logits: Tensor | None,  # [Hq]
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    budget = indices.shape[3]
    out = query.new_zeros((batch, heads, query_length, value_dim))
    lse = lse_of_nothing(query, sink_logits)
    sink = None if sink_logits is None else sink_logits.view(-1, 1, 1)
    if out.numel() == 0 or budget == 0 or key_length == 0:
        return out, lse
    compute = torch.promote_types(query.dtype, torch.float32)
    key_rows, value_rows = key.flatten(0, 2), value.flatten(0, 2)

    for chunk in query_chunks(query_length, batch * heads * budget * max(head_dim, value_dim)):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)
        queries, keys = query[:, :, chunk].to(compute), key_rows[rows].to(compute)
        probabilities, chunk_lse = softmax(_scores(queries, keys, filled, scale, softcap), sink)
        # An empty slot reads row 0, whose NaN must not leak: 0 · NaN is NaN.
        values = torch.where(filled.unsqueeze(-1), value_rows[rows].to(compute), 0.0)
        out[:, :, chunk] = (probabilities.unsqueeze(-2) @ values).squeeze(-2).to(out.dtype)
        lse[:, :, chunk] = chunk_lse.to(torch.float32)
    return out, lse


@implements
def gathered_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]; other wings need it, this one recomputes
    lse: Tensor,  # float32 [B, Hq, Tq]; likewise
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,  # [Hq]; for this wing alone, to others the LSE says it
    atomics: bool,  # for the GPU wings
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    budget = indices.shape[3]
    compute = torch.promote_types(query.dtype, torch.float32)
    grad_query = query.new_zeros(query.shape)
    grad_key = key.new_zeros((batch * kv_heads * key_length, head_dim), dtype=compute)
    grad_value = value.new_zeros((batch * kv_heads * key_length, value_dim), dtype=compute)
    key_rows, value_rows = key.flatten(0, 2), value.flatten(0, 2)
    empty = out.numel() == 0 or budget == 0 or key_length == 0
    sink = None if sink_logits is None else sink_logits.view(-1, 1, 1)

    for chunk in query_chunks(
        0 if empty else query_length, batch * heads * budget * max(head_dim, value_dim)
    ):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)
        queries, grads = query[:, :, chunk].to(compute), grad_out[:, :, chunk].to(compute)
        keys = torch.where(filled.unsqueeze(-1), key_rows[rows].to(compute), 0.0)
        values = torch.where(filled.unsqueeze(-1), value_rows[rows].to(compute), 0.0)
        scores = _scores(queries, keys, filled, scale, softcap)
        probabilities, _ = softmax(scores, sink)
        # dS = P ∘ (dO·Vᵀ − Σ P ∘ (dO·Vᵀ) + dLSE)
        grad_probabilities = (values @ grads.unsqueeze(-1)).squeeze(-1)
        centre = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - grad_lse[:, :, chunk].to(compute).unsqueeze(-1)
        slopes = cap_slopes(scores, softcap) * scale
        grad_scores = torch.where(filled, probabilities * (grad_probabilities - centre) * slopes, 0.0)
        grad_query[:, :, chunk] = (grad_scores.unsqueeze(-2) @ keys).squeeze(-2).to(query.dtype)
        add_rows(grad_key, rows, grad_scores.unsqueeze(-1) * queries.unsqueeze(-2), filled)
        add_rows(grad_value, rows, probabilities.unsqueeze(-1) * grads.unsqueeze(-2), filled)
    return (
        grad_query,
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(value.shape).to(value.dtype),
    )


def add_rows(total: Tensor, rows: Tensor, terms: Tensor, filled: Tensor) -> None:
    """total[rows] += terms over the filled slots, in one order whatever the number of threads."""
    # Empty slots carry row 0: their terms are 0 unless the query holds NaN, hence the mask.
    terms = torch.where(filled.unsqueeze(-1), terms, 0.0).flatten(0, 3)
    rows = rows.flatten()
    if total.device.type == "cpu":
        # On the CPU index_put_ adds with atomics from several threads; scatter_add_ keeps the order.
        total.scatter_add_(0, rows.unsqueeze(-1).expand_as(terms), terms)
    else:
        total.index_put_((rows,), terms, accumulate=True)


def along(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,  # [Hq]
    tangents: SimpleNamespace,  # of query, key, value and sink_logits, each of its tensor's shape; None is 0
) -> tuple[Tensor, Tensor]:  # of out [B, Hq, Tq, Dv] and of lse float32 [B, Hq, Tq]
    """Forward mode of `gathered_attention`; differentiable itself, and nothing is changed in place."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    budget = indices.shape[3]
    query_move, key_move, value_move = tangents.query, tangents.key, tangents.value
    if query_length == 0 or budget == 0 or key_length == 0:
        nothing = query.new_zeros((*query.shape[:3], value_dim))
        return nothing, lse_along_nothing(query, tangents.sink_logits)
    sink = None if sink_logits is None else sink_logits.view(-1, 1, 1)
    compute = torch.promote_types(query.dtype, torch.float32)
    outs, lses = [], []
    for chunk in query_chunks(query_length, 4 * batch * heads * budget * max(head_dim, value_dim)):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)

        def gathered(tensor: Tensor, rows=rows, filled=filled) -> Tensor:  # [B, Hq, t, K, D]
            return torch.where(filled.unsqueeze(-1), tensor.flatten(0, 2)[rows].to(compute), 0.0)

        queries, keys, values = query[:, :, chunk].to(compute), gathered(key), gathered(value)
        scores = _scores(queries, keys, filled, scale, softcap)
        probabilities, own = softmax(scores, sink)
        # dLSE = Σ P ∘ dS, dO = Σ P ∘ (dS − dLSE) · V + P · dV; of a sink V is 0
        moves = torch.zeros_like(probabilities)
        if query_move is not None:
            moves = moves + (keys @ query_move[:, :, chunk].to(compute).unsqueeze(-1)).squeeze(-1)
        if key_move is not None:
            moves = moves + (gathered(key_move) @ queries.unsqueeze(-1)).squeeze(-1)
        moves = torch.where(filled, moves * cap_slopes(scores, softcap) * scale, 0.0)
        lse = (probabilities * moves).sum(-1)
        if sink is not None and tangents.sink_logits is not None:
            lse = lse + sink_share(sink, own.unsqueeze(-1)).squeeze(-1) * tangents.sink_logits.view(-1, 1)
        out = (probabilities * (moves - lse.unsqueeze(-1))).unsqueeze(-2) @ values
        if value_move is not None:
            out = out + probabilities.unsqueeze(-2) @ gathered(value_move)
        outs.append(out.squeeze(-2).to(query.dtype))
        lses.append(lse.to(torch.float32))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
