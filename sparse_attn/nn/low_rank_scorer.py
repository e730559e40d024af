"""Selection by fewer components: queries and keys projected so that their products change least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.topk_select import quantized_select, topk_select


class LowRankScorer(WholeState):
    r"""Ranks keys by q·k in `rank` dimensions. Fitted by a calibration pass, never trained.

    Per key head, with C_q and C_k the second moments of the queries and keys that :meth:`calibrate` has seen, and
    the singular value decomposition :math:`C_q^{1/2} C_k^{1/2} = U \Sigma V^\top`, the projections

    .. math:: A = \Sigma_r^{1/2} U_r^\top C_q^{-1/2}, \qquad B = \Sigma_r^{1/2} V_r^\top C_k^{-1/2}

    minimise the mean of :math:`(q \cdot k - Aq \cdot Bk)^2` over independent q and k: "balanced", where principal
    components of the keys alone would ignore what queries look at. Feed queries and keys as the attention uses
    them, after their rotary embedding.

    Args:
        num_kv_heads: key heads; the query heads of one share its projection.
        head_dim: D.
        rank: components that are kept, at most D.
        int8: rank by projections that are rounded to 8 bits (:func:`sparse_attn.quantized_select`).

    Raises:
        TypeError, ValueError: a wrong argument, named in the message. RuntimeError: used before :meth:`fit`.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = torch.randn(1, 8, 256, 64), torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64)
        >>> scorer = sparse_attn.nn.LowRankScorer(num_kv_heads=2, head_dim=64, rank=16)
        >>> scorer.calibrate(q, k).fit()
        LowRankScorer(num_kv_heads=2, head_dim=64, rank=16, int8=False)
        >>> indices = scorer.select(q, k, 32, is_causal=True)
        >>> sparse_attn.gathered_attention(q, k, v, indices).shape
        torch.Size([1, 8, 256, 64])
    """

    query_moment: Tensor
    key_moment: Tensor
    query_projection: Tensor
    key_projection: Tensor
    fitted: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int, rank: int, *, int8: bool = False) -> None:
        super().__init__()
        self.num_kv_heads = checks.integer("num_kv_heads", num_kv_heads, 1)
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.rank = checks.integer("rank", rank, 1, self.head_dim)
        self.int8 = checks.boolean("int8", int8)
        square, narrow = (num_kv_heads, head_dim, head_dim), (num_kv_heads, head_dim, rank)
        # Sums of q·qᵀ and k·kᵀ, in float64: they run over a whole calibration pass.
        self.register_buffer("query_moment", torch.zeros(square, dtype=torch.float64), persistent=False)
        self.register_buffer("key_moment", torch.zeros(square, dtype=torch.float64), persistent=False)
        self.register_buffer("query_projection", torch.zeros(narrow))  # Aᵀ [Hkv, D, rank]
        self.register_buffer("key_projection", torch.zeros(narrow))  # Bᵀ [Hkv, D, rank]
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As before the first :meth:`calibrate`."""
        for buffer in self.buffers():
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankScorer:
        moments = {"query_moment": self.query_moment, "key_moment": self.key_moment}
        super()._apply(fn, recurse)
        if self.fitted.device.type != "meta" and moments["key_moment"].device.type == "meta":
            self.reset_parameters()  # `to_empty` leaves unwritten memory, which must not look as if it were fitted
            return self
        for name, moment in moments.items():
            if getattr(self, name).dtype != torch.float64:  # sums would overflow in half types
                setattr(self, name, moment.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor) -> LowRankScorer:
        """Adds query [B, Hq, Tq, D] and key [B, Hkv, Tk, D] to what `fit` works from; may be called often."""
        self._check(query, key)
        query, key = query.unflatten(1, (self.num_kv_heads, -1)).double(), key.double()
        of_queries = torch.einsum("bhrtd,bhrte->hde", query, query)
        of_keys = torch.einsum("bhtd,bhte->hde", key, key)
        for name, moment in (("query", of_queries), ("key", of_keys)):
            if not bool(moment.isfinite().all()):  # it would spoil all that was added before
                raise ValueError(f"{name} must be finite, got NaN or inf in it")
        self.query_moment += of_queries
        self.key_moment += of_keys
        return self

    @torch.no_grad()
    def fit(self) -> LowRankScorer:
        """Computes the projections from all that was calibrated on."""
        if not bool(self.key_moment.any()):
            raise RuntimeError("LowRankScorer.fit needs calibrate(query, key) before it")
        query_root, query_inverse = _roots(self.query_moment)
        key_root, key_inverse = _roots(self.key_moment)
        left, values, right = torch.linalg.svd(query_root @ key_root)
        factor = values[:, None, : self.rank].sqrt()
        # The sums are not means: that scales A and B by constants whose product is 1.
        of_queries = query_inverse @ left[:, :, : self.rank] * factor
        of_keys = key_inverse @ right.mT[:, :, : self.rank] * factor
        self.query_projection.copy_(of_queries)
        self.key_projection.copy_(of_keys)
        self.fitted.fill_(True)
        return self

    def queries(self, query: Tensor) -> Tensor:
        """query [B, Hq, T, D] → [B, Hq, T, rank]."""
        projection = self.query_projection.to(query.dtype).unsqueeze(1)
        return (query.unflatten(1, (self.num_kv_heads, -1)) @ projection).flatten(1, 2)

    def keys(self, key: Tensor) -> Tensor:
        """key [B, Hkv, T, D] → [B, Hkv, T, rank]: made once per position, and kept beside the key/value cache."""
        return key @ self.key_projection.to(key.dtype)

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor | None, top_k: int, *, keys: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Indices for `gathered_attention`, as :func:`sparse_attn.topk_select` gives them.

        Args:
            query: [B, Hq, Tq, D].
            key: [B, Hkv, Tk, D], or None with `keys`.
            top_k, options: those of :func:`sparse_attn.topk_select`; `scale` is by default 1/√D of the full width.
            keys: what :meth:`keys` gave for all positions so far.
        """
        if not bool(self.fitted):
            raise RuntimeError("LowRankScorer.select needs fit() before it, or a loaded state")
        self._check(query, key)
        if (key is None) == (keys is None):
            raise ValueError("select takes key or keys, one of them")
        if options.get("scale") is None:
            options["scale"] = 1 / math.sqrt(self.head_dim)
        choose = quantized_select if self.int8 else topk_select
        if key is not None:
            keys = self.keys(key)
        assert keys is not None
        return choose(self.queries(query), keys, top_k, **options)

    def _check(self, query: Tensor, key: Tensor | None) -> None:
        checks.query_key(query, query[:, : self.num_kv_heads] if key is None else key)
        heads = self.num_kv_heads if key is None else key.shape[1]
        if heads != self.num_kv_heads or query.shape[3] != self.head_dim:
            raise ValueError(
                f"this scorer is for {self.num_kv_heads} key heads of width {self.head_dim}, "
                f"got {heads} of width {query.shape[3]}"
            )

    def extra_repr(self) -> str:
        return (
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, rank={self.rank}, int8={self.int8}"
        )


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M^{1/2} and its pseudo-inverse of positive semidefinite M [..., D, D]."""
    values, vectors = torch.linalg.eigh(moment)
    roots = values.clamp(min=0).sqrt()
    # Directions in which nothing was seen have no say.
    real = roots > 1e-6 * roots.amax(-1, keepdim=True)
    inverse = torch.where(real, 1 / torch.where(real, roots, 1.0), 0.0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT
