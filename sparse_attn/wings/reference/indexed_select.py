"""Definition of `indexed_select`: the selection of `topk_select`, from keys that a key index does not rule out."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule, selection_shape
from sparse_attn.wings.reference.chunks import query_chunks
from sparse_attn.wings.reference.index_keys import AT_ONCE, rows_of
from sparse_attn.wings.reference.rounding import rounded
from sparse_attn.wings.reference.rule import VisibleKeys, attention_mass, best_of, capped
from sparse_attn.wings.reference.topk_select import products
from sparse_attn.wings.reference.wing import implements


@implements
def indexed_select(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    top_k: int,
    rule: PackedRule,
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
) -> Tensor:  # int32 [B, G, Tq, K]
    batch, heads, query_length, _ = query.shape
    shape = selection_shape(query, key, top_k, rule)
    indices = query.new_empty(shape, dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    wide = key.to(torch.promote_types(query.dtype, torch.float32))
    keys, index = VisibleKeys(key, rule), KeyBounds(*rows_of(codes, bounds, *key.shape[2:]), shift)
    for rows in query_chunks(query_length, batch * heads * key.shape[2]):
        few = query[:, :, rows].to(wide.dtype)
        tile = products(few, wide) * rule.scale
        visible, forced = keys.of(rows)
        if rule.groups < heads:  # the mass of a key needs every score
            tile = capped(tile, rule.softcap).unflatten(1, (rule.groups, heads // rule.groups))
            tile = attention_mass(tile, visible, rule.sink_logits)
            left = visible
        else:
            budget = shape[3] - forced.sum(-1, keepdim=True)
            left = visible & (forced | index.possible(few, rule.scale, visible & ~forced, budget))
        indices[:, :, rows] = best_of(tile, left, forced, shape[3])
    return indices


class KeyBounds:
    """The bounds of lib/decode_index.h. What float32 rounds where keys and queries meet is within their rest."""

    def __init__(
        self,
        codes: Tensor,  # int8 [B, Hkv, Tk, D]
        numbers: Tensor,  # float32 [B, Hkv, Tk, 3]
        shift: Tensor,  # float32 [B, Hkv, D]
        compute: torch.dtype = torch.float64,
    ) -> None:
        self.codes, self.compute = codes, compute
        three = (n.unsqueeze(2).to(compute) for n in numbers.unbind(-1))
        self.scale, self.error, self.norm = three  # [B, Hkv, 1, Tk]
        self.shift = shift.double().norm(dim=-1)[..., None, None].to(compute)  # [B, Hkv, 1, 1]
        self.heads = codes.shape[1]

    def possible(self, query: Tensor, scale: float, candidates: Tensor, budget: Tensor) -> Tensor:
        """bool [B, Hq, t, Tk]: which of the candidates may be among the best `budget` [B, Hq, t, 1] of them."""
        dim = query.shape[3]
        # A scale that takes products to 0 or infinity makes ties of them: nothing is ruled out then.
        sign = 0.0 if not 1e-18 < abs(scale) < 1e18 else 1.0 if scale > 0 else -1.0
        signed = query.double() * sign
        numbers, step = rounded(signed)
        near = numbers * step
        size, near_size, error = (t.norm(dim=-1, keepdim=True) for t in (signed, near, signed - near))
        useful = (size > 1e-15) & (size < 1e18)

        def per_key_head(rows: Tensor) -> Tensor:
            return rows.to(self.compute).unflatten(1, (self.heads, -1)).flatten(2, 3)  # [B, Hkv, R·t, …]

        # Sums of whole numbers, which are exact: below 2²⁴.
        score = self._products(per_key_head(numbers)) * (self.scale * per_key_head(step))  # [B, Hkv, R·t, Tk]
        unit = (2 * dim + 32) * 2.0**-23
        bound = self.norm * per_key_head(error + unit * (size + error))
        bound = bound + self.error * per_key_head(near_size) + unit * per_key_head(size) * self.shift
        bound = (bound + 1e-30 * (1 + per_key_head(size))) * (1 + 1e-5)
        low, high = (
            t.unflatten(2, (-1, query.shape[2])).flatten(1, 2) for t in (score - bound, score + bound)
        )
        low = low.nan_to_num(nan=-torch.inf).masked_fill(~candidates, -torch.inf)
        last = budget.clamp(1, low.shape[-1]).to(torch.int64) - 1
        order = low.topk(int(last.max()) + 1).values  # descending
        return ~(high <= order.gather(-1, last)) | ~useful

    def _products(self, query: Tensor) -> Tensor:
        """Whole numbers [B, Hkv, R·t, D] of queries → [B, Hkv, R·t, Tk], with some codes in floats at a time."""
        step = max(1, AT_ONCE // max(1, self.codes[:, :, :1].numel()))
        parts = [query @ codes.to(self.compute).mT for codes in self.codes.split(step, 2)]
        return torch.cat(parts, -1)
