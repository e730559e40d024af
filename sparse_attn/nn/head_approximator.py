"""A learned stand-in for the output of an attention head: an MLP on the values of its chosen keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.per_head import PerHeadLinear
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.shards import refuse_context
from sparse_attn.wings.reference.chunks import query_chunks


class HeadApproximator(WholeState):
    r"""Per head an MLP on the concatenated values of a query's chosen keys, in place of softmax(q·k) v.

    .. math:: o_i = W_2^\top\,\mathrm{gelu}(W_1^\top [v_{j_1}; \dots; v_{j_k}] + b_1) + b_2, \qquad j_1 > j_2 > \dots

    The values stand newest first, whatever the order of `indices`, so that the first slots mean the same in every row,
    those with few keys too. Empty slots come last and are zero.

    It sees neither the query nor the keys, so it cannot weigh the values by how well they match; the exact
    :func:`sparse_attn.gathered_attention` over the same keys can, with 2·k·head_dim multiply-adds per query against
    (k + 1)·head_dim·hidden here. It is here to be compared with.

    Args:
        head_dim: D, the width of a value and of the output.
        top_k: slots, the most keys a query may have.
        num_heads: query heads, each with an MLP of its own.
        hidden: width of the hidden layer.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> approximator = sparse_attn.nn.HeadApproximator(head_dim=16, top_k=8, num_heads=4)
        >>> q, k, v = (torch.randn(2, 4, 100, 16) for _ in range(3))
        >>> approximator(v, sparse_attn.topk_select(q, k, 8, is_causal=True)).shape
        torch.Size([2, 4, 100, 16])
    """

    def __init__(
        self,
        head_dim: int,
        top_k: int,
        *,
        num_heads: int,
        hidden: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.top_k = checks.integer("top_k", top_k, 1)
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.hidden = checks.integer("hidden", hidden, 1)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner = PerHeadLinear(self.num_heads, self.top_k * self.head_dim, self.hidden, **options)
        self.outer = PerHeadLinear(self.num_heads, self.hidden, self.head_dim, **options)

    def forward(self, value: Tensor, indices: Tensor) -> Tensor:
        """value [B, Hkv, Tk, D] and int32 indices [B, G, Tq, K ≤ top_k] (G = 1, Hkv or H) → [B, H, Tq, D].

        Differentiable in the parameters and in value. Any index < 0 or ≥ Tk is an empty slot. Works through
        blocks of queries: the gathered values, Tq·K·D numbers a head, are stored only where a gradient needs them.
        """
        refuse_context("HeadApproximator")
        rows, table = self._rows(value, indices)
        batch, length = rows.shape[0], rows.shape[2]
        if length == 0 or batch == 0:
            return value.new_zeros(batch, self.num_heads, length, self.head_dim)
        chunks = query_chunks(length, batch * self.num_heads * self.top_k * self.head_dim)
        return torch.cat([self._block(rows[:, :, chunk], table) for chunk in chunks], dim=2)

    def _rows(self, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Which row of the table stands in each slot, int64 [B, H, Tq, top_k], and the table [B·Hkv·(Tk + 1), D]."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"value must be a tensor of shape [B, Hkv, Tk, {self.head_dim}], got {checks.describe(value)}"
            )
        if value.dim() != 4 or value.shape[3] != self.head_dim:
            raise ValueError(
                f"value must have shape [B, Hkv, Tk, {self.head_dim}], got {checks.describe(value)}"
            )
        batch, kv_heads, key_length = value.shape[:3]
        if kv_heads == 0 or self.num_heads % kv_heads:
            raise ValueError(
                f"the heads of value must divide num_heads = {self.num_heads}, got {checks.describe(value)}"
            )
        if not isinstance(indices, Tensor) or indices.dim() not in (3, 4):
            raise ValueError(
                f"indices must have shape [B, G, Tq, K] or [B, Tq, K], got {checks.describe(indices)}"
            )
        queries = value.new_empty(1).expand(batch, self.num_heads, indices.shape[-2], 1)  # a shape, no memory
        indices = checks.indices_of(indices, queries, value)
        if indices.shape[3] > self.top_k:
            raise ValueError(
                f"indices must have at most top_k = {self.top_k} slots, got {checks.describe(indices)}"
            )
        # Row Tk of each head is zeros and stands for the empty slots, the missing ones too.
        slots = torch.nn.functional.pad(indices, (0, self.top_k - indices.shape[3]), value=-1).long()
        slots = slots.where((slots >= 0) & (slots < key_length), -1).sort(-1, descending=True).values
        slots = slots.where(slots >= 0, key_length)
        slots = slots.repeat_interleave(self.num_heads // indices.shape[1], dim=1)  # [B, H, Tq, top_k]
        head = torch.arange(self.num_heads, device=value.device) // (self.num_heads // kv_heads)
        first = torch.arange(batch, device=value.device).unsqueeze(1) * kv_heads + head  # [B, H]
        table = torch.nn.functional.pad(value, (0, 0, 0, 1)).flatten(0, 2)
        return slots + first[:, :, None, None] * (key_length + 1), table

    def _block(self, rows: Tensor, table: Tensor) -> Tensor:
        """rows int64 [B, H, t, top_k] → [B, H, t, D]."""
        # `embedding`, because its gradient adds rows in a fixed order on every device.
        values = torch.nn.functional.embedding(rows, table).flatten(3)  # [B, H, t, top_k·D]
        return self.outer(torch.nn.functional.gelu(self.inner(values)))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, top_k={self.top_k}, num_heads={self.num_heads}, hidden={self.hidden}"
        )
