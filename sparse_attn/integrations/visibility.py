"""Which keys a query of a Hugging Face model may see: without a [Tq, Tk] mask wherever a number will do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CausalMask:
    """Query i sees the keys 0 … i + offset that are not padding."""

    offset: int
    padding: Tensor | None  # bool [B, Tk], True = a token, False = padding

    @classmethod
    def of(
        cls,
        tokens: Tensor | None,  # bool [B, keys seen so far]
        query_length: int,
        key_length: int,
        query_offset: int,
        key_offset: int,
    ) -> CausalMask | None:
        """None where all is visible up to the diagonal and the shapes alone tell where that is."""
        padding = None
        if tokens is not None:
            missing = key_offset + key_length - tokens.shape[-1]
            tokens = torch.nn.functional.pad(tokens, (0, max(0, missing)))
            padding = tokens[:, key_offset : key_offset + key_length]
            if not torch.compiler.is_compiling() and bool(padding.all()):
                padding = None
        offset = query_offset - key_offset
        at_the_end = query_length in (1, key_length) and offset == key_length - query_length
        return None if padding is None and at_the_end else cls(offset, padding)


@dataclass(frozen=True)
class Visibility:
    """What one layer's queries see, in the arguments of `topk_attention`."""

    is_causal: bool
    offset: int  # with is_causal: query i sees keys 0 … i + offset
    mask: Tensor | None  # bool [B or 1, 1 or Hq, Tq or 1, Tk], True = visible
    query_length: int
    key_length: int

    @classmethod
    def of(cls, mask: Tensor | CausalMask | None, query: Tensor, key: Tensor, causal: bool) -> Visibility:
        queries, keys = query.shape[2], key.shape[2]
        if isinstance(mask, CausalMask):
            padding = None if mask.padding is None else mask.padding[:, None, None, :]
            return cls(True, mask.offset, padding, queries, keys)
        if mask is None:
            # As transformers means it: one query is the last of all, several are the first.
            return cls(causal, keys - 1 if queries == 1 else 0, None, queries, keys)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"attention_mask must be boolean (True = may attend) or None, got {what}; "
                "an additive mask of 0 and -inf is `mask == 0`"
            )
        if mask.dim() != 4 or mask.shape[-1] != keys:
            raise ValueError(
                f"attention_mask must be [B, 1, Tq, Tk] with Tk = {keys}, got {list(mask.shape)}"
            )
        return cls(False, 0, mask, queries, keys)

    def arguments(self) -> dict:
        """Of `topk_attention` and the selections."""
        offset = self.offset if self.is_causal else None
        return {"is_causal": self.is_causal, "causal_offset": offset, "attn_mask": self.mask}

    def of_first_keys(self, count: int) -> Visibility:
        """The same for the first `count` keys alone; no query sees any other."""
        mask = None if self.mask is None else self.mask[..., :count]
        return Visibility(self.is_causal, self.offset, mask, self.query_length, count)

    def without_padding_behind(self) -> Visibility:
        """For selections that take no mask: causal, with padding in front of a sequence alone left in the mask.

        Padding behind a sequence is in the future of all its queries, and what padded queries see is of no interest.
        """
        if not self.is_causal or (self.mask is not None and self.mask.shape[2] != 1):
            raise ValueError(
                "selector='blocks' and residual=True take plain causal attention with padding at the ends of a "
                "sequence; this model's layers have another mask (sliding windows, packed sequences, a static cache)"
            )
        if self.mask is None:
            return self
        tokens = self.mask[:, 0, 0]  # [B, Tk]
        if bool((tokens.int().diff(dim=-1) > 0).sum(-1).gt(1 - tokens[:, 0].int()).any()):
            raise ValueError(
                "selector='blocks' and residual=True take padding at the ends of a sequence, got some within"
            )
        inside = tokens.int().cummax(-1).values.bool()
        mask = None if bool(inside.all()) else inside[:, None, None]
        return Visibility(True, self.offset, mask, self.query_length, self.key_length)

    def starts(self) -> list[int] | None:
        """For each sequence its first key that is no padding; None where there is no mask (all begin at 0)."""
        if self.mask is None:
            return None
        any_query = self.mask.flatten(1, 2).any(1)  # [B, Tk]
        return any_query.int().argmax(-1).tolist()

    def row(self, b: int, start: int) -> tuple[Visibility, int]:
        """Sequence b without the keys before `start`, and the first query that sees one of the others."""
        first = max(0, start - self.offset) if self.is_causal else 0
        mask = None
        if self.mask is not None:
            mask = self.mask[b if self.mask.shape[0] > 1 else 0][None, ..., start:]
            mask = mask[:, :, first:] if mask.shape[2] > 1 else mask
        offset = self.offset + first - start
        return Visibility(
            self.is_causal, offset, mask, self.query_length - first, self.key_length - start
        ), first

    def dense_attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """scaled_dot_product_attention over all that is visible: [B, Hq, Tq, Dv]."""
        mask, causal = self.mask, self.is_causal
        if causal:
            # Keys behind the last query's diagonal (of a static cache, say) are seen by none.
            keys = max(0, min(self.key_length, self.query_length + self.offset))
            key, value = key[:, :, :keys], value[:, :, :keys]
            mask = None if mask is None else mask[..., :keys]
            causal = self.offset < keys - 1  # else the first query sees them all, and so do the others
            if causal and (mask is not None or self.offset != 0):
                ones = torch.ones((self.query_length, keys), dtype=torch.bool, device=query.device)
                diagonal = ones.tril(self.offset)
                mask, causal = diagonal if mask is None else mask & diagonal, False
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def only_visible(self, indices: Tensor) -> Tensor:
        """indices [B, Tq, K] with those of invisible keys made −1: a model's own selection may hold such."""
        inside = (indices >= 0) & (indices < self.key_length)
        visible = inside
        if self.is_causal:
            last = torch.arange(self.query_length, device=indices.device) + self.offset
            visible = visible & (indices <= last[:, None])
        if self.mask is not None:
            mask = self.mask[:, 0].expand(indices.shape[0], self.query_length, self.key_length)
            visible = visible & mask.gather(-1, torch.where(inside, indices, 0).long())
        return torch.where(visible, indices, -1)


def last_visible(seen: Visibility, query: Tensor) -> Visibility:
    """A mask that holds the causal diagonal itself, with the diagonal made known: a window needs to know it.

    Query i's own key is the last that it may see, so the offset is the largest of (last visible key − i).
    """
    keys = torch.arange(seen.key_length, device=query.device)
    last = torch.where(seen.mask, keys, -seen.key_length - seen.query_length).amax((0, 1, 3))  # [Tq or 1]
    queries = torch.arange(seen.query_length, device=query.device)
    return Visibility(True, int((last - queries).max()), seen.mask, seen.query_length, seen.key_length)


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,  # bool [B, keys seen so far], True = not padding
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others,
) -> Tensor | CausalMask | None:
    """What transformers passes to every layer as `attention_mask`.

    Plain causal visibility stays a number and the padding, without a [Tq, Tk] tensor; what is more (sliding windows,
    packed sequences, prefixes, static caches) is the boolean mask of scaled_dot_product_attention.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    # A static cache counts its positions in a tensor, or has keys behind the last query.
    plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip
    grows = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if not plain or not grows:
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **others,
        )
    return CausalMask.of(attention_mask, q_length, kv_length, q_offset, kv_offset)
