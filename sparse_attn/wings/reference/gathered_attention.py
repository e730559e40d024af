"""Definition of `gathered_attention` and of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.chunks import query_chunks
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


def _scores(query: Tensor, keys: Tensor, filled: Tensor, scale: float) -> Tensor:
    """scale · q·k of the filled slots, −inf elsewhere: [B, Hq, t, K]."""
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1) * scale
    return torch.where(filled, scores, -torch.inf)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, LSE); a row with nothing to attend to has probabilities 0 and LSE −inf."""
    lse = scores.logsumexp(-1)
    # Not exp(scores − lse): the rounding of a large LSE would be a factor on the whole row.
    probabilities = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, scores.softmax(-1))
    return probabilities, lse


@implements
def gathered_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    budget = indices.shape[3]
    out = query.new_zeros((batch, heads, query_length, value_dim))
    lse = query.new_full((batch, heads, query_length), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or budget == 0 or key_length == 0:
        return out, lse
    compute = torch.promote_types(query.dtype, torch.float32)
    key_rows, value_rows = key.flatten(0, 2), value.flatten(0, 2)

    for chunk in query_chunks(query_length, batch * heads * budget * max(head_dim, value_dim)):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)
        probabilities, chunk_lse = softmax(
            _scores(query[:, :, chunk].to(compute), key_rows[rows].to(compute), filled, scale)
        )
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

    for chunk in query_chunks(
        0 if empty else query_length, batch * heads * budget * max(head_dim, value_dim)
    ):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)
        queries, grads = query[:, :, chunk].to(compute), grad_out[:, :, chunk].to(compute)
        keys = torch.where(filled.unsqueeze(-1), key_rows[rows].to(compute), 0.0)
        values = torch.where(filled.unsqueeze(-1), value_rows[rows].to(compute), 0.0)
        probabilities, _ = softmax(_scores(queries, keys, filled, scale))
        # dS = P ∘ (dO·Vᵀ − Σ P ∘ (dO·Vᵀ) + dLSE)
        grad_probabilities = (values @ grads.unsqueeze(-1)).squeeze(-1)
        centre = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        if grad_lse is not None:
            centre = centre - grad_lse[:, :, chunk].to(compute).unsqueeze(-1)
        grad_scores = torch.where(filled, probabilities * (grad_probabilities - centre) * scale, 0.0)
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
    query_move: Tensor | None,  # the tangents, each of its tensor's shape; None is 0
    key_move: Tensor | None,
    value_move: Tensor | None,
) -> tuple[Tensor, Tensor]:  # of out [B, Hq, Tq, Dv] and of lse float32 [B, Hq, Tq]
    """Forward mode of `gathered_attention`; differentiable itself, and nothing is changed in place."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    budget = indices.shape[3]
    if query_length == 0 or budget == 0 or key_length == 0:
        nothing = query.new_zeros((*query.shape[:3], value_dim))
        return nothing, nothing.new_zeros(query.shape[:3], dtype=torch.float32)
    compute = torch.promote_types(query.dtype, torch.float32)
    outs, lses = [], []
    for chunk in query_chunks(query_length, 4 * batch * heads * budget * max(head_dim, value_dim)):
        rows, filled = _rows_of(indices[:, :, chunk], heads, kv_heads, key_length)

        def gathered(tensor: Tensor, rows=rows, filled=filled) -> Tensor:  # [B, Hq, t, K, D]
            return torch.where(filled.unsqueeze(-1), tensor.flatten(0, 2)[rows].to(compute), 0.0)

        queries, keys, values = query[:, :, chunk].to(compute), gathered(key), gathered(value)
        probabilities, _ = softmax(_scores(queries, keys, filled, scale))
        # dLSE = Σ P ∘ dS, dO = Σ P ∘ (dS − dLSE) · V + P · dV
        moves = torch.zeros_like(probabilities)
        if query_move is not None:
            moves = moves + (keys @ query_move[:, :, chunk].to(compute).unsqueeze(-1)).squeeze(-1)
        if key_move is not None:
            moves = moves + (gathered(key_move) @ queries.unsqueeze(-1)).squeeze(-1)
        moves = torch.where(filled, moves * scale, 0.0)
        lse = (probabilities * moves).sum(-1)
        out = (probabilities * (moves - lse.unsqueeze(-1))).unsqueeze(-2) @ values
        if value_move is not None:
            out = out + probabilities.unsqueeze(-2) @ gathered(value_move)
        outs.append(out.squeeze(-2).to(query.dtype))
        lses.append(lse.to(torch.float32))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
