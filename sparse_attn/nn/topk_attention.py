"""A self-attention module whose queries attend to chosen keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.indexer import Indexer
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.selection import Exact, FromIndexer, Rule, Selector, select_and_attend
from sparse_attn.selection.selection import check_selector


class TopKAttention(WholeState):
    """Causal multi-head self-attention in which each query attends to its `top_k` best keys.

    Drop-in for the attention of a nanoGPT-style block: [B, T, C] in, [B, T, C] out. With fewer `num_kv_heads`
    than `num_heads` it is grouped-query attention. ``top_k=None`` is dense attention by
    scaled_dot_product_attention, with the same parameters, for comparison and for switching at run time
    (`module.top_k` may be changed between calls).

    Args:
        embed_dim: C, the model width; a multiple of num_heads.
        num_heads: query heads.
        top_k: keys per query, or None for dense attention.
        num_kv_heads: key/value heads, a divisor of num_heads; None means num_heads.
        bias: whether the projections have biases.
        dropout: probability of zeroing an element of the output (residual dropout), in training.
        window, sinks, share, backend: as in :func:`sparse_attn.topk_attention`.
        selector: how keys are chosen: None by true q·k, a selector of :mod:`sparse_attn.selection` or any object with
            its `select` method, or a :class:`sparse_attn.nn.Indexer` of embed_dim, which reads the hidden states.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> attention = sparse_attn.nn.TopKAttention(embed_dim=64, num_heads=4, top_k=16, num_kv_heads=2)
        >>> attention(torch.randn(2, 128, 64)).shape
        torch.Size([2, 128, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        top_k: int | None,
        *,
        num_kv_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        window: int = 0,
        sinks: int = 0,
        share: str = "none",
        selector: Selector | Indexer | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = checks.integer("embed_dim", embed_dim, 1)
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.num_kv_heads = (
            self.num_heads if num_kv_heads is None else checks.integer("num_kv_heads", num_kv_heads, 1)
        )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if top_k is not None:
            checks.budget(top_k, window, sinks, True)
        elif window or sinks:
            raise ValueError(
                f"window and sinks need a top_k, got window={window}, sinks={sinks} with top_k=None"
            )
        checks.groups_of(share, self.num_heads, self.num_kv_heads)
        self.head_dim = self.embed_dim // self.num_heads
        self.top_k, self.window, self.sinks, self.share, self.backend = top_k, window, sinks, share, backend
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = torch.nn.Linear(self.embed_dim, width, bias=bias, device=device, dtype=dtype)
        self.out = torch.nn.Linear(self.embed_dim, self.embed_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)
        if isinstance(selector, Indexer) and selector.hidden_size != self.embed_dim:
            raise ValueError(
                f"selector must be an Indexer of hidden_size {self.embed_dim}, got one of {selector.hidden_size}"
            )
        if top_k is None and selector is not None:
            raise ValueError("selector needs a top_k, got top_k=None")
        self.token_selector = (
            selector if selector is None or isinstance(selector, Indexer) else check_selector(selector)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, embed_dim] → [B, T, embed_dim]."""
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self.embed_dim:
            raise ValueError(
                f"hidden must have shape [B, T, {self.embed_dim}], got {checks.describe(hidden)}"
            )
        attended = self.attend(*self.split_heads(self.qkv(hidden)), selector=self._selector_for(hidden))
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))

    def _selector_for(self, hidden: Tensor) -> Selector | None:
        chosen = self.token_selector if self.top_k is not None else None
        if not isinstance(chosen, Indexer):
            return chosen
        with torch.no_grad():
            query, weights = chosen.queries(hidden)
            return FromIndexer(query, chosen.keys(hidden), weights, chosen.int8, chosen.backend)

    def split_heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `qkv` returns, [B, T, (H + 2·Hkv)·Dh] → query [B, H, T, Dh], key and value [B, Hkv, T, Dh]."""
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2·Hkv, T, Dh]
        return heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, selector: Selector | None = None) -> Tensor:
        """The outputs of the heads, before the output projection: [B, H, T, Dh], of what `split_heads` returns."""
        if self.top_k is None:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
            )
        rule = Rule(is_causal=True, window=self.window, sinks=self.sinks, share=self.share)
        selector = Exact(self.backend) if selector is None else selector
        return select_and_attend(query, key, value, self.top_k, selector, rule, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"top_k={self.top_k}, window={self.window}, sinks={self.sinks}, share={self.share!r}"
        )
