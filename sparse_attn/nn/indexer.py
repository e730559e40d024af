"""A small learned scorer beside an attention layer: which keys its queries should attend to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.indexer_loss import indexer_loss
from sparse_attn.ops.indexer_select import indexer_select


class Indexer(WholeState):
    r"""From hidden states to the keys that each query should attend to, at a fraction of the attention's cost.

    A few narrow heads with one key each per group: :math:`\mathrm{score}_{ij} = \sum_h w_{hi} \max(0, q_{hi} \cdot
    k_j)`. :meth:`loss` trains it to rank keys as an attention layer weighs them; :meth:`select` gives indices for
    :func:`sparse_attn.gathered_attention`. Hidden states are differentiated like any input: detach them to train
    the indexer alone.

    Args:
        hidden_size: C, the width of the hidden states.
        num_heads: Hi, heads per group.
        head_dim: D, their width.
        groups: G, 1 for a selection that all attention heads share, Hkv for one per key/value head.
        int8: select by scores of queries and keys rounded to 8 bits (see :func:`sparse_attn.indexer_select`).
        backend: force one wing; None chooses.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Source: the lightning indexer of DeepSeek-AI, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek
    Sparse Attention" (2025).

    Example:
        >>> import torch, sparse_attn
        >>> indexer = sparse_attn.nn.Indexer(hidden_size=64)
        >>> hidden = torch.randn(1, 128, 64)
        >>> q, k, v = torch.randn(1, 8, 128, 16), torch.randn(1, 2, 128, 16), torch.randn(1, 2, 128, 16)
        >>> indexer.loss(hidden, q, k).backward()  # q and k: the attention's, after their rotary embedding
        >>> indices = indexer.select(hidden, top_k=16, window=4, sinks=1)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 8, 128, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        head_dim: int = 32,
        *,
        groups: int = 1,
        int8: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = checks.integer("hidden_size", hidden_size, 1)
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.groups = checks.integer("groups", groups, 1)
        self.int8, self.backend = checks.boolean("int8", int8), backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = self.groups * self.num_heads
        self.query = torch.nn.Linear(self.hidden_size, heads * self.head_dim, bias=False, **where)
        self.key = torch.nn.Linear(self.hidden_size, self.groups * self.head_dim, bias=False, **where)
        self.key_norm = torch.nn.LayerNorm(self.head_dim, **where)
        self.weight = torch.nn.Linear(self.hidden_size, heads, bias=False, **where)

    def queries(
        self,
        hidden: Tensor,  # [B, T, C]
        rope: tuple[Tensor, Tensor] | None = None,  # cos, sin [B or 1, T, R]
    ) -> tuple[Tensor, Tensor]:
        """(query [B, G·Hi, T, D], weights [B, G·Hi, T]) of hidden states at the positions that `rope` is of."""
        self._check(hidden)
        query = self.query(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        weights = self.weight(hidden).transpose(1, 2) * (self.num_heads * self.head_dim) ** -0.5
        return self._rotated(query, rope), weights

    def keys(
        self,
        hidden: Tensor,  # [B, T, C]
        rope: tuple[Tensor, Tensor] | None = None,  # cos, sin [B or 1, T, R]
    ) -> Tensor:
        """key [B, G, T, D]: made once per position, and kept beside the key/value cache."""
        self._check(hidden)
        key = self.key_norm(self.key(hidden).unflatten(-1, (-1, self.head_dim)))
        return self._rotated(key.transpose(1, 2), rope)

    @torch.no_grad()
    def select(
        self,
        hidden: Tensor,  # [B, Tq, C]
        top_k: int,
        *,
        keys: Tensor | None = None,  # [B, G, Tk, D]
        rope: tuple[Tensor, Tensor] | None = None,
        is_causal: bool = True,
        causal_offset: int | None = None,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        window: int = 0,
        sinks: int = 0,
        key_starts: Tensor | None = None,
    ) -> Tensor:
        """Indices int32 [B, G, Tq, min(top_k, Tk)] for `gathered_attention`; nothing is differentiated.

        Args:
            hidden: the queries' hidden states.
            top_k, is_causal, attn_mask, key_lengths, window, sinks, key_starts: as in
                :func:`sparse_attn.indexer_select`.
            keys: what :meth:`keys` gave for all positions so far; None makes them of `hidden`.
            rope: cos and sin of the queries' positions (see :meth:`queries`), None for no rotary embedding.
            causal_offset: None takes the queries for the last positions: Tk − Tq.
        """
        query, weights = self.queries(hidden, rope)
        keys = self.keys(hidden, rope) if keys is None else keys
        if is_causal and causal_offset is None:
            causal_offset = keys.shape[2] - query.shape[2]
        return indexer_select(
            query,
            keys,
            weights,
            top_k,
            is_causal=is_causal,
            causal_offset=causal_offset,
            attn_mask=attn_mask,
            key_lengths=key_lengths,
            window=window,
            sinks=sinks,
            int8=self.int8,
            key_starts=key_starts,
            backend=self.backend,
        )

    forward = select

    def loss(
        self,
        hidden: Tensor,  # [B, T, C]
        query: Tensor,  # [B, Hq, T, D of the attention]
        key: Tensor,  # [B, Hkv, T, D of the attention]
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        indices: Tensor | None = None,  # int32 [B, G, T, K]
        is_causal: bool = True,
        attn_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        scale: float | None = None,
        key_starts: Tensor | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,  # float [Hq]
    ) -> Tensor:
        """KL from the attention of `query` and `key` to the softmax of the scores: see `sparse_attn.indexer_loss`.

        Over all visible keys (the dense warm-up), or over those that `indices` names, such as what :meth:`select`
        gave. query, key, softcap and sink_logits are those of the attention layer, query and key after their rotary
        embedding, and constants here.
        """
        index_query, weights = self.queries(hidden, rope)
        if indices is not None:
            is_causal, attn_mask, key_lengths, key_starts = False, None, None, None
        return indexer_loss(
            index_query,
            self.keys(hidden, rope),
            weights,
            query,
            key,
            indices=indices,
            is_causal=is_causal,
            attn_mask=attn_mask,
            key_lengths=key_lengths,
            scale=scale,
            key_starts=key_starts,
            softcap=softcap,
            sink_logits=sink_logits,
        )

    def _check(self, hidden: Tensor) -> None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must have shape [B, T, {self.hidden_size}], got {checks.describe(hidden)}"
            )

    def _rotated(self, heads: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """heads [B, H, T, D] with their first R components rotated; of more frequencies than fit, every n-th."""
        if rope is None:
            return heads
        cos, sin = rope
        width = cos.shape[-1]
        if cos.shape != sin.shape or cos.dim() != 3 or width % 2 or cos.shape[1] != heads.shape[2]:
            raise ValueError(
                f"rope must be (cos, sin), each [B, T, R] with R even and T = {heads.shape[2]}, "
                f"got {checks.describe(cos)} and {checks.describe(sin)}"
            )
        if width > self.head_dim:
            if width % self.head_dim or self.head_dim % 2:
                raise ValueError(
                    f"rope's width R must be at most head_dim = {self.head_dim}, or a multiple of it with "
                    f"head_dim even, got {width}"
                )
            step = width // self.head_dim  # both halves hold the same frequencies: a stride keeps them paired
            cos, sin, width = cos[..., ::step], sin[..., ::step], self.head_dim
        cos, sin = (t.unsqueeze(1).to(heads.dtype) for t in (cos, sin))
        turned, rest = heads[..., :width], heads[..., width:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, rest), dim=-1)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"groups={self.groups}, int8={self.int8}"
        )
