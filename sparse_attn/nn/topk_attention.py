"""A self-attention module whose queries attend to chosen keys alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.indexer import Indexer
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.shards import refuse_context
from sparse_attn.selection import Exact, FromIndexer, Rule, Selector, select_and_attend
from sparse_attn.selection.selection import check_selector


class Projections(WholeState):
    """The input projections of attention: `query`, `key` and `value`, which tensor parallelism splits by columns.

    Called, it gives all three next to each other, [B, T, (H + 2·Hkv)·Dh], as one fused projection would; `weight` and
    `bias` are those of that projection, made anew at each look. Its state is loaded from a fused one's, too.
    """

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear

    def __init__(self, embed_dim: int, widths: tuple[int, ...], bias: bool, **where: Any) -> None:
        super().__init__()
        fused = torch.nn.Linear(embed_dim, sum(widths), bias=bias, **where)  # one draw, as it always was
        for name, width, at in zip(
            ("query", "key", "value"), widths, (0, widths[0], sum(widths[:2])), strict=True
        ):
            part = torch.nn.Linear(embed_dim, width, bias=bias, device="meta")
            for own, _ in list(part.named_parameters()):
                rows = getattr(fused, own).detach()[at : at + width].clone()
                setattr(part, own, torch.nn.Parameter(rows))
            self.add_module(name, part)

    def parts(self) -> list[torch.nn.Linear]:
        """query, key, value"""
        return [self.query, self.key, self.value]

    @property
    def weight(self) -> Tensor:
        """[(H + 2·Hkv)·Dh, embed_dim]"""
        return torch.cat([part.weight for part in self.parts()])

    @property
    def bias(self) -> Tensor | None:
        """[(H + 2·Hkv)·Dh]"""
        if self.query.bias is None:
            return None
        return torch.cat([part.bias for part in self.parts()])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.parts()], dim=-1)

    def _why_not_load(self, state: dict[str, Any], prefix: str) -> str | None:
        return self.unfuse(state, prefix) or super()._why_not_load(state, prefix)

    def unfuse(self, state: dict[str, Any], prefix: str) -> str | None:
        """Puts a fused projection's rows under the names of the three; says why not where they do not fit."""
        rows = [part.out_features for part in self.parts()]
        for name in ("weight", "bias"):
            fused = state.get(f"{prefix}{name}")
            if fused is None:
                continue
            if not isinstance(fused, Tensor) or fused.dim() == 0 or len(fused) != sum(rows):
                return (
                    f"size mismatch for {prefix}{name}: the module has {sum(rows)} rows, "
                    f"the state {checks.describe(fused)}"
                )
            del state[f"{prefix}{name}"]
            for (part, _), piece in zip(self.named_children(), fused.split(rows), strict=True):
                state[f"{prefix}{part}.{name}"] = piece
        return None


class TopKAttention(WholeState):
    """Causal multi-head self-attention in which each query attends to its `top_k` best keys.

    Drop-in for the attention of a nanoGPT-style block: [B, T, C] in, [B, T, C] out. With fewer `num_kv_heads`
    than `num_heads` it is grouped-query attention. ``top_k=None`` is dense attention by
    scaled_dot_product_attention, with the same parameters, for comparison and for switching at run time
    (`module.top_k` may be changed between calls); with a soft cap or sink logits, which that does not have, by
    topk_attention with a budget for all keys.

    Args:
        embed_dim: C, the model width; a multiple of num_heads.
        num_heads: query heads.
        top_k: keys per query, or None for dense attention.
        num_kv_heads: key/value heads, a divisor of num_heads; None means num_heads.
        bias: whether the projections have biases.
        dropout: probability of zeroing an element of the output (residual dropout), in training.
        window, sinks, share, softcap, backend: as in :func:`sparse_attn.topk_attention`.
        sink_logits: whether each head learns one more logit of its softmax (a parameter [num_heads], zeros at first).
        selector: how keys are chosen: None by true q·k, a selector of :mod:`sparse_attn.selection` or any object with
            its `select` method, or a :class:`sparse_attn.nn.Indexer` of embed_dim, which reads the hidden states.

    The projections are `qkv.query`, `qkv.key`, `qkv.value` and `out`, by which tensor-parallel plans name them
    (docs/distributed.md); a state with one fused `qkv.weight` is loaded, too.

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
        softcap: float | None = None,
        sink_logits: bool = False,
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
        checks.soft_cap(softcap)
        self.softcap = softcap
        learned = checks.boolean("sink_logits", sink_logits)
        self.head_dim = self.embed_dim // self.num_heads
        self.top_k, self.window, self.sinks, self.share, self.backend = top_k, window, sinks, share, backend
        widths = (self.embed_dim, *[self.num_kv_heads * self.head_dim] * 2)
        self.qkv = Projections(self.embed_dim, widths, bias, device=device, dtype=dtype)
        self.out = torch.nn.Linear(self.embed_dim, self.embed_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = torch.nn.Dropout(dropout)
        logits = torch.empty(self.num_heads, device=device, dtype=dtype) if learned else None
        self.sink_logits = None if logits is None else torch.nn.Parameter(logits)
        self.reset_parameters()
        if isinstance(selector, Indexer) and selector.hidden_size != self.embed_dim:
            raise ValueError(
                f"selector must be an Indexer of hidden_size {self.embed_dim}, got one of {selector.hidden_size}"
            )
        if top_k is None and selector is not None:
            raise ValueError("selector needs a top_k, got top_k=None")
        self.token_selector = (
            selector if selector is None or isinstance(selector, Indexer) else check_selector(selector)
        )

    def reset_parameters(self) -> None:
        """The module's own parameters as they begin; its layers have theirs."""
        if self.sink_logits is not None:
            torch.nn.init.zeros_(self.sink_logits)

    def _why_not_load(self, state: dict[str, Any], prefix: str) -> str | None:
        return self.qkv.unfuse(state, f"{prefix}qkv.") or super()._why_not_load(state, prefix)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, embed_dim] → [B, T, embed_dim]."""
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self.embed_dim:
            raise ValueError(
                f"hidden must have shape [B, T, {self.embed_dim}], got {checks.describe(hidden)}"
            )
        heads = self.project(hidden)
        selector = self._selector_for(hidden)
        self._refuse_split(heads[0].shape[1], selector)
        attended = self.attend(*heads, selector=selector)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))

    def _selector_for(self, hidden: Tensor) -> Selector | None:
        chosen = self.token_selector if self.top_k is not None else None
        if not isinstance(chosen, Indexer):
            return chosen
        with torch.no_grad():
            query, weights = chosen.queries(hidden)
            return FromIndexer(query, chosen.keys(hidden), weights, chosen.int8, chosen.backend)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, C] → query [B, H, T, Dh], key and value [B, Hkv, T, Dh]; of split heads this rank's."""
        heads = (part(hidden).unflatten(-1, (-1, self.head_dim)) for part in self.qkv.parts())
        query, key, value = (h.transpose(1, 2) for h in heads)
        return query, key, value

    def _refuse_split(self, heads: int, selector: Selector | None) -> None:
        """Where tensor parallelism has left this rank some of the heads."""
        if heads == self.num_heads or self.top_k is None or self.share != "all":
            return
        if selector is None or not (
            isinstance(selector, FromIndexer) or getattr(selector, "across_ranks", False)
        ):
            raise ValueError(
                f"share='all' is one selection of all heads, and tensor parallelism has left {heads} of "
                f"{self.num_heads} here: sparse_attn.distributed.tensor_parallel sums over the ranks"
            )

    def _own_sinks(self) -> Tensor | None:
        """Under tensor parallelism those of this rank's heads."""
        sinks: Any = self.sink_logits
        return sinks.to_local() if hasattr(sinks, "placements") else sinks

    def split_heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `qkv` returns, [B, T, (H + 2·Hkv)·Dh] → query [B, H, T, Dh], key and value [B, Hkv, T, Dh]."""
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2·Hkv, T, Dh]
        return heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, selector: Selector | None = None) -> Tensor:
        """The outputs of the heads, before the output projection: [B, H, T, Dh], of what `split_heads` returns."""
        plain = self.softcap is None and self.sink_logits is None
        if self.top_k is None:
            refuse_context("dense attention (top_k=None)")
        if self.top_k is None and plain:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
            )
        rule = Rule(
            is_causal=True, window=self.window, sinks=self.sinks, share=self.share, softcap=self.softcap,
            sink_logits=self._own_sinks(),
        )  # fmt: skip
        selector = Exact(self.backend) if selector is None else selector
        top_k = max(1, key.shape[2]) if self.top_k is None else self.top_k
        return select_and_attend(query, key, value, top_k, selector, rule, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"top_k={self.top_k}, window={self.window}, sinks={self.sinks}, share={self.share!r}, "
            f"softcap={self.softcap}, sink_logits={self.sink_logits is not None}"
        )
