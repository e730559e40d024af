"""Self-attention in which chosen heads are approximated by small networks and the rest are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.head_approximator import HeadApproximator
from sparse_attn.nn.key_selector import KeySelector
from sparse_attn.nn.topk_attention import TopKAttention
from sparse_attn.ops.gathered_attention import attend
from sparse_attn.selection import Selector


class HybridAttention(TopKAttention):
    """Causal self-attention: `approximated_heads` by KeySelector and HeadApproximator, the rest dense or exact top-k.

    Drop-in for :class:`TopKAttention`, [B, T, C] in, [B, T, C] out, and the same as that without approximated heads.
    `selector` and `approximator` hold the networks of the approximated heads in ascending order of the heads (None
    where there are none). They know nothing until they are trained on a teacher (`sparse_attn.distillation`): the
    model's own loss reaches the approximator, but not the selector, because a selection is not differentiated.

    The keys of the approximated heads are still projected, since the projection is one with the others'; where
    approximate_output is off they are also used.

    Args:
        embed_dim, num_heads, num_kv_heads, bias, dropout, window, sinks, share, backend: as in TopKAttention.
        top_k: keys per query of the heads that are not approximated, or None for dense attention. Like window, sinks
            and share it says nothing about the others.
        approximated_heads: which query heads, each 0 … num_heads − 1, none twice. With ``share="kv"`` whole groups
            that share a key head.
        max_length: longest sequence; needed where heads are approximated: a KeySelector has a logit per position.
        approximated_top_k: keys per query of the approximated heads.
        approximate_output: True, the output of an approximated head is a HeadApproximator's; False, exact attention to
            the keys that the selector chose.
        hidden: width of the hidden layers of both networks.
        relative: as in KeySelector.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> dense = sparse_attn.nn.TopKAttention(embed_dim=64, num_heads=4, top_k=None)
        >>> hybrid = sparse_attn.nn.HybridAttention.from_attention(dense, approximated_heads=[0, 2], max_length=128)
        >>> hybrid(torch.randn(2, 128, 64)).shape
        torch.Size([2, 128, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        top_k: int | None = None,
        *,
        approximated_heads: Sequence[int] = (),
        max_length: int | None = None,
        approximated_top_k: int = 8,
        approximate_output: bool = True,
        hidden: int = 64,
        relative: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        window: int = 0,
        sinks: int = 0,
        share: str = "none",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            top_k,
            num_kv_heads=num_kv_heads,
            bias=bias,
            dropout=dropout,
            window=window,
            sinks=sinks,
            share=share,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.approximated_heads = self._checked_heads(approximated_heads)
        self.approximate_output = checks.boolean("approximate_output", approximate_output)
        self.selector: KeySelector | None = None
        self.approximator: HeadApproximator | None = None
        if not self.approximated_heads:
            return
        if max_length is None:
            raise ValueError("max_length must be given where heads are approximated, got None")
        options: dict[str, Any] = {
            "num_heads": len(self.approximated_heads),
            "hidden": hidden,
            "device": device,
            "dtype": dtype,
        }
        self.selector = KeySelector(
            self.head_dim, max_length, approximated_top_k, relative=relative, **options
        )
        if approximate_output:
            self.approximator = HeadApproximator(self.head_dim, approximated_top_k, **options)

    @classmethod
    def from_attention(
        cls, attention: TopKAttention, *, approximated_heads: Sequence[int], **options: Any
    ) -> HybridAttention:
        """`attention` with some heads approximated: copies of its weights, its settings unless `options` has others.

        Args:
            attention: a TopKAttention; it is not changed.
            approximated_heads: which query heads.
            options: any other keyword of HybridAttention (max_length, approximated_top_k, hidden, top_k, …).
        """
        if not isinstance(attention, TopKAttention):
            raise TypeError(f"attention must be a TopKAttention, got {checks.describe(attention)}")
        if attention.token_selector is not None:
            raise ValueError("attention must choose its keys by true q·k, got one with a selector")
        if attention.softcap is not None or attention.sink_logits is not None:
            raise ValueError("attention must have a plain softmax, got one with softcap or sink_logits")
        weight = attention.qkv.weight
        settings = {
            "top_k": attention.top_k,
            "num_kv_heads": attention.num_kv_heads,
            "bias": attention.qkv.bias is not None,
            "dropout": attention.dropout.p,
            "window": attention.window,
            "sinks": attention.sinks,
            "share": attention.share,
            "backend": attention.backend,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        hybrid = cls(
            attention.embed_dim,
            attention.num_heads,
            approximated_heads=approximated_heads,
            **(settings | options),
        )
        hybrid.qkv.load_state_dict(attention.qkv.state_dict())
        hybrid.out.load_state_dict(attention.out.state_dict())
        return hybrid.train(attention.training)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, selector: Selector | None = None) -> Tensor:
        """query [B, H, T, Dh], key and value [B, Hkv, T, Dh] → the outputs of all heads, [B, H, T, Dh]."""
        if not self.approximated_heads:
            return super().attend(query, key, value)
        approximated = self.approximated_heads
        rest = tuple(head for head in range(self.num_heads) if head not in approximated)
        parts = [self.attend_approximately(*self.heads_of(approximated, query, key, value))]
        if rest:
            parts.append(super().attend(*self.heads_of(rest, query, key, value)))
        order = approximated + rest
        back = torch.tensor([order.index(head) for head in range(self.num_heads)], device=query.device)
        return torch.cat(parts, dim=1).index_select(1, back)

    def attend_approximately(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, A, T, Dh], key and value [B, A or fewer, T, Dh] of the approximated heads → [B, A, T, Dh]."""
        assert self.selector is not None  # there are such heads
        indices = self.selector.select(query, backend=self.backend)
        if self.approximator is not None:
            return self.approximator(value, indices)
        return attend(query, key, value, indices, backend=self.backend)[0]

    def heads_of(
        self, heads: Sequence[int], query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, H, T, Dh], key and value [B, Hkv, T, Dh] → those of the query heads `heads`, in their order.

        Key and value heads are shared as before if `heads` are whole groups, else repeated for each query head.
        """
        group = self.num_heads // self.num_kv_heads
        key_heads = _whole_groups(heads, group)
        if key_heads is None:
            key_heads = [head // group for head in heads]
        chosen = torch.tensor(key_heads, device=query.device)
        return (
            query.index_select(1, torch.tensor(heads, device=query.device)),
            key.index_select(1, chosen),
            value.index_select(1, chosen),
        )

    def _checked_heads(self, heads: object) -> tuple[int, ...]:
        if isinstance(heads, (str, bytes)) or not isinstance(heads, Sequence):
            raise TypeError(f"approximated_heads must be a sequence of ints, got {checks.describe(heads)}")
        heads = [checks.integer("each of approximated_heads", head, 0, self.num_heads - 1) for head in heads]
        if len(set(heads)) != len(heads):
            raise ValueError(f"approximated_heads must name each head once, got {heads}")
        heads = sorted(heads)
        if self.share == "kv" and _whole_groups(heads, self.num_heads // self.num_kv_heads) is None:
            raise ValueError(
                'with share="kv" approximated_heads must be whole groups of heads that share a key head '
                f"({self.num_heads // self.num_kv_heads} heads each), got {heads}"
            )
        return tuple(heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximated_heads={self.approximated_heads}"


def _whole_groups(heads: Sequence[int], group: int) -> list[int] | None:
    """The key heads of ascending query heads that are whole groups of `group`; None if they are not."""
    key_heads = [head // group for head in heads[::group]]
    whole = [key_head * group + i for key_head in key_heads for i in range(group)]
    return key_heads if whole == list(heads) else None
