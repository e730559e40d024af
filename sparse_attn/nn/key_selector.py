"""A learned guess, from the query alone, at which key positions it will attend to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.per_head import PerHeadLinear, check_input
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.shards import refuse_context
from sparse_attn.ops.topk_select import topk_select


class KeySelector(WholeState):
    r"""Per head an MLP from a query to a logit for each key position; its top-k positions are the keys to attend to.

    .. math:: z_i = W_2^\top\,\mathrm{gelu}(W_1^\top q_i + b_1) + b_2 \in \mathbb{R}^{\text{max\_length}},
              \qquad S_i = \operatorname{top\text{-}k}_{j \le i}\, z_{ij}

    **It cannot know what the keys hold.** A logit belongs to a position, not to a key: two texts that give the same
    query at the same place get the same keys. So it can learn "the token before", "the start of the text" or
    whatever the query itself tells about positions, and it can never find a name that was mentioned somewhere
    earlier. Seen from the algebra, W_2 is a table of learned keys, one per position, that is the same for every text:
    :meth:`select` is :func:`sparse_attn.topk_select` over that table. A scorer that reads the keys does better at
    the same cost; this one is the baseline to beat.

    With ``relative=True`` the logits belong to distances, z_ij = (W_2ᵀ gelu(…) + b_2)_{i−j}: "the token before" is
    then one output instead of max_length rules, but the keys stay as unknown as before.

    Nothing is known past `max_length` positions. Train with :meth:`loss`.

    Args:
        head_dim: D, the width of a query.
        max_length: key positions that have a logit.
        top_k: keys per query that `select` returns unless it is told otherwise.
        num_heads: query heads, each with an MLP of its own.
        hidden: width of the hidden layer.
        relative: logits for distances from the query instead of positions; for causal attention.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> selector = sparse_attn.nn.KeySelector(head_dim=16, max_length=128, top_k=8, num_heads=4)
        >>> q, k, v = (torch.randn(2, 4, 100, 16) for _ in range(3))
        >>> indices = selector.select(q)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([2, 4, 100, 16])
    """

    def __init__(
        self,
        head_dim: int,
        max_length: int,
        top_k: int,
        *,
        num_heads: int,
        hidden: int = 64,
        relative: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.max_length = checks.integer("max_length", max_length, 1)
        self.top_k = checks.integer("top_k", top_k, 1)
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.hidden = checks.integer("hidden", hidden, 1)
        self.relative = checks.boolean("relative", relative)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner = PerHeadLinear(self.num_heads, self.head_dim, self.hidden, **options)
        self.positions = PerHeadLinear(self.num_heads, self.hidden, self.max_length, **options)

    def forward(self, query: Tensor, *, is_causal: bool = True, causal_offset: int | None = None) -> Tensor:
        """query [B, H, T, D] → logits [B, H, T, max_length], −inf at the positions that a query may not see.

        Args:
            query: as the attention's, before q·k.
            is_causal: query i sees positions 0 … i + causal_offset.
            causal_offset: the position of the first query, for a block of queries; None means 0.
        """
        check_input("query", query, self.num_heads, self.head_dim)
        logits, visible = self._logits(query, self.max_length, is_causal, causal_offset)
        return logits if visible is None else logits.masked_fill(~visible, -torch.inf)

    @torch.no_grad()
    def select(
        self,
        query: Tensor,  # [B, H, T, D]
        top_k: int | None = None,
        *,
        is_causal: bool = True,
        causal_offset: int | None = None,
        key_length: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """The top_k positions of each query: int32 [B, H, T, min(top_k, key_length)], unique, ascending, −1 last.

        Ties go to the smaller position, with ``relative=True`` to the smaller distance.
        No [T, T] logits are stored: they are those of :func:`sparse_attn.topk_select`, which works through blocks of
        queries. Nothing is differentiated.

        Args:
            query: [B, H, T, D].
            top_k: None means the module's.
            is_causal: query i sees positions 0 … i + causal_offset.
            causal_offset: must be given where key_length is not T (key_length − T: the queries are the last).
            key_length: how many keys there are, at most max_length; None means T.
            backend: as in topk_select.
        """
        refuse_context("KeySelector")
        check_input("query", query, self.num_heads, self.head_dim)
        top_k = self.top_k if top_k is None else checks.integer("top_k", top_k, 1)
        key_length = query.shape[2] if key_length is None else checks.integer("key_length", key_length, 0)
        self._check_length("key_length", key_length)
        offset = checks.causal_offset_of(self._causal(is_causal), causal_offset, query.shape[2], key_length)
        if self.relative and offset + query.shape[2] > key_length:
            raise ValueError(
                f"with relative=True causal_offset + T must be at most key_length = {key_length}, "
                f"got {offset} + {query.shape[2]}"
            )
        # z_ij = features_i · W₂[:, j] + b_j: a constant feature of 1 takes the bias along.
        features = self._features(query)  # [B, H, T, hidden]
        features = torch.cat((features, features.new_ones(*features.shape[:3], 1)), dim=-1)
        table = torch.cat(
            (self.positions.weight, self.positions.bias.unsqueeze(1)), dim=1
        )  # [H, hidden + 1, max]
        keys = table[..., :key_length].transpose(1, 2).contiguous().to(features.dtype)
        indices = topk_select(
            features,
            keys.expand(query.shape[0], -1, -1, -1),
            top_k,
            is_causal=is_causal,
            causal_offset=offset if is_causal else None,
            scale=1.0,
            backend=backend,
        )
        if not self.relative:
            return indices
        # These are distances: a query sees those of at most its own position, as it sees positions.
        last = torch.arange(query.shape[2], device=query.device, dtype=torch.int32).unsqueeze(1) + offset
        ascending = (last - indices).where(indices >= 0, key_length).sort(-1).values
        return ascending.where(ascending < key_length, -1)

    def loss(
        self,
        query: Tensor,  # [B, H, t, D]
        target: Tensor,  # [B, H, t, Tk]
        *,
        from_scores: bool = False,
        is_causal: bool = True,
        causal_offset: int | None = None,
    ) -> Tensor:
        r"""Mean over the queries of :math:`\mathrm{KL}(p_i \,\|\, \mathrm{softmax}(z_i))`, p the teacher's attention.

        The teacher's whole row is the target, not its best key alone: what the selection should hold is attention
        mass, and its best key is often one of several that are nearly as good.

        Args:
            query: the teacher's queries, or a block of them.
            target: the teacher's attention mass (rows are divided by their sum; a row without mass does not
                count), or with ``from_scores=True`` its scores before the softmax. What a query may not see is
                left out.
            from_scores: whether target holds scores.
            is_causal, causal_offset: as in :meth:`forward`; queries i … of a longer sequence have causal_offset=i.

        Returns:
            A scalar, differentiable in the parameters (and in query), at least 0 up to rounding.
        """
        check_input("query", query, self.num_heads, self.head_dim)
        wanted = f"[{', '.join(map(str, query.shape[:3]))}, Tk]"
        if not isinstance(target, Tensor) or target.dim() != 4 or target.shape[:3] != query.shape[:3]:
            raise ValueError(
                f"target must have shape [B, H, t, Tk] = {wanted}, got {checks.describe(target)}"
            )
        self._check_length("target's last dimension", target.shape[3])
        logits, visible = self._logits(query, target.shape[3], is_causal, causal_offset)
        logits, target = logits.float(), target.float()
        if visible is not None:
            # The lowest finite number, because −inf · 0 would be NaN.
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
            target = target.masked_fill(~visible, -torch.inf if from_scores else 0.0)
        if from_scores:
            target = torch.where((target == -torch.inf).all(-1, keepdim=True), 0.0, target.softmax(-1))
        mass = target.sum(-1, keepdim=True)  # [B, H, t, 1]
        target = torch.where(mass == 0, 0.0, target / mass)
        divergence = (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)
        return divergence.sum() / (mass != 0).sum().clamp(min=1)

    def _features(self, query: Tensor) -> Tensor:
        """query [B, H, T, D] → [B, H, T, hidden]."""
        return torch.nn.functional.gelu(self.inner(query))

    def _logits(
        self, query: Tensor, length: int, is_causal: bool, causal_offset: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the first `length` positions [B, H, T, length]; which are visible, [T, length], or None for all."""
        # Equal lengths, because here None stands for 0 whatever they are.
        offset = checks.causal_offset_of(self._causal(is_causal), causal_offset, length, length)
        if not is_causal:
            return self.positions(self._features(query), length), None
        last = torch.arange(query.shape[2], device=query.device).unsqueeze(1) + offset
        distance = last - torch.arange(length, device=query.device)  # [T, length]
        if not self.relative:
            return self.positions(self._features(query), length), distance >= 0
        self._check_length("with relative=True causal_offset + T", offset + query.shape[2])
        logits = self.positions(self._features(query))
        place = distance.clamp(min=0).expand(*logits.shape[:2], -1, -1)
        return logits.gather(-1, place), distance >= 0

    def _causal(self, is_causal: object) -> bool:
        is_causal = checks.boolean("is_causal", is_causal)
        if not is_causal and self.relative:
            raise ValueError("relative=True needs is_causal=True, got is_causal=False")
        return is_causal

    def _check_length(self, name: str, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"{name} must be at most max_length = {self.max_length}, got {length}")

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, max_length={self.max_length}, top_k={self.top_k}, "
            f"num_heads={self.num_heads}, hidden={self.hidden}, relative={self.relative}"
        )
