"""Attention to given keys of which the chosen rows alone travel: ranks ask each other for what their queries chose."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.distributed.collectives import Group, exchange, exchanged, rank_in
from sparse_attn.distributed.layout import Layout, local_places, owners
from sparse_attn.ops import gathered_attention


def attend(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, Tk_r, D]
    value: Tensor,  # [B, Hkv, Tk_r, Dv]
    indices: Tensor,  # int [B, G, T_r, K], of keys of the whole sequence
    keys: Layout,
    group: Group,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,  # float [Hq]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries; gradients of keys and values go back to where these are."""
    checks.query_key(query, key)
    checks.value_of(key, value)
    if indices.dim() == 3:
        indices = indices.unsqueeze(1)
    inside = (indices >= 0) & (indices < keys.length)
    positions = indices[inside].to(torch.int64).unique()  # ascending; of any batch entry and head
    owner = owners(keys, positions)
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=keys.ranks).tolist()
    ones = [1] * keys.ranks
    asked = exchange(torch.tensor(counts, device=query.device), ones, ones, group, "requests").tolist()
    places = local_places(keys, rank_in(group), exchange(positions[order], counts, asked, group, "requests"))
    # One exchange for keys and values: [n, B, Hkv, D + Dv].
    rows = torch.cat((key, value), -1).index_select(2, places).movedim(2, 0)
    rows = exchanged(rows, asked, counts, group, "chosen rows")
    rows = rows.index_select(0, order.argsort()).movedim(0, 2)
    at = torch.searchsorted(positions, torch.where(inside, indices, 0).to(torch.int64).contiguous())
    at = torch.where(inside, at, -1).to(torch.int32)
    own_key, own_value = rows.split((key.shape[3], value.shape[3]), -1)
    return gathered_attention.attend(
        query, own_key, own_value, at, scale=scale, softcap=softcap, sink_logits=sink_logits, backend=backend
    )
