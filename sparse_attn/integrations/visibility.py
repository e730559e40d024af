"""Which keys a query of a Hugging Face model may see: without a [Tq, Tk] mask wherever numbers will do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_attn.rule import Rule
from sparse_attn.selection import Exact, select_and_attend

_QUERIES = 512  # at least, that are worked on at a time in a sliding window


@dataclass(frozen=True)
class Visibility:
    """What the queries of one call see: a key that each of the parts shows."""

    query_length: int
    key_length: int
    offset: int | None = None  # query i sees keys 0 … i + offset; None: its own key does not end what it sees
    padding: Tensor | None = None  # bool [B, Tk], True = a token
    mask: Tensor | None = None  # bool [B or 1, 1 or Hq, Tq or 1, Tk], True = visible
    starts: Tensor | None = (
        None  # int [B] or [B, Tq]: the first key of the query's sequence, maybe before key 0
    )
    dropped: int = 0  # so many first keys a sliding cache no longer holds
    # A sliding window of so many keys, of which `starts` [B, Tq] has the first; never beside `mask` or `padding`.
    reach: int | None = None
    # int []: how many keys follow the last query's own. A static cache under torch.compile counts its keys in a
    # tensor; then `offset` is not known as a number.
    behind: Tensor | None = None
    ndim: ClassVar[int] = (
        4  # what generate() has made in advance comes back to the mask function as a made mask
    )

    @classmethod
    def of(cls, mask: Tensor | Visibility | None, query: Tensor, key: Tensor, causal: bool) -> Visibility:
        """From what a layer was called with."""
        if isinstance(mask, Visibility):
            return mask
        queries, keys = query.shape[2], key.shape[2]
        if mask is None:
            # As transformers means it: one query is the last of all, several are the first.
            return cls(queries, keys, (keys - 1 if queries == 1 else 0) if causal else None)
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
        return cls(queries, keys, mask=mask)

    def in_order(self) -> Visibility:
        """With the place of each query's own key, where only a mask shows it: the queries are the last keys then."""
        offset = self.key_length - self.query_length
        if self.ordered or self.mask is None or offset < 0:
            return self
        mask = self.mask.expand(-1, -1, self.query_length, -1)
        own = mask.diagonal(offset, -2, -1)  # the last keys of a static cache are nobody's own
        right = none_beyond(mask, offset) and holds((own | ~mask.any(-1)).all())
        return replace(self, offset=offset) if right else self

    @property
    def ordered(self) -> bool:
        """Whether what a query sees ends at its own key."""
        return self.offset is not None or self.behind is not None

    def rule(self, **others: Any) -> Rule:
        """With `others`: what is always kept, who shares, and what becomes of the scores."""
        return Rule(self.offset is not None, self.offset, self._masks(), key_starts=self.starts, **others)

    def _masks(self) -> Tensor | None:
        """bool [B or 1, 1 or Hq, Tq or 1, Tk]: the mask and the padding."""
        if self.padding is None:
            return self.mask
        padding = self.padding[:, None, None, :]
        return padding if self.mask is None else self.mask & padding

    def with_starts(self, batch: int) -> Visibility:
        """With each query's first visible key where nothing else says where its sequence starts."""
        if self.reach is not None:
            return self.spelled_out()
        if self.starts is not None or self.mask is None:
            return self
        first = self.mask.any(1).to(torch.uint8).argmax(-1)  # [B or 1, Tq or 1]
        return replace(self, starts=first.expand(batch, self.query_length))

    def spelled_out(self) -> Visibility:
        """A sliding window as a mask, beside where the sequences start."""
        if self.reach is None:
            return self
        assert self.starts is not None
        assert self.offset is not None
        starts, keys = self.starts, torch.arange(self.key_length, device=self.starts.device)
        mask = self._diagonal(self.offset, self.key_length, starts.device) & (keys >= starts[0].unsqueeze(-1))
        return replace(self, mask=mask[None, None], starts=starts.new_zeros(len(starts)), reach=None)

    def of_rows(self, rows: slice, batch: int) -> tuple[int, dict[str, Any]]:
        """What some queries of a whole sequence see, for the public functions, and how many first keys that takes."""
        seen = self.in_order()
        if seen.mask is not None and seen.mask.shape[1] > 1:
            raise ValueError("its heads see different keys")
        keys, found = seen.key_length, {}
        if seen.offset is not None:
            keys = max(0, min(keys, rows.stop + seen.offset))
            found |= {"is_causal": True, "causal_offset": rows.start + seen.offset}
        mask = seen.of_first_keys(keys)._masks()
        if mask is not None:
            mask = mask.expand(-1, -1, seen.query_length, -1)
            found["attn_mask"] = mask[:, :, rows]
        if seen.starts is not None:
            starts = seen.starts.expand(batch, *seen.starts.shape[1:])
            found["key_starts"] = starts if starts.dim() == 1 else starts[:, rows]
        return keys, found

    def of_first_keys(self, count: int) -> Visibility:
        """The same for the first `count` keys alone; no query sees any other."""
        if count == self.key_length:
            return self
        padding = None if self.padding is None else self.padding[:, :count]
        mask = None if self.mask is None else self.mask[..., :count]
        return replace(self, key_length=count, padding=padding, mask=mask)

    def sees_no_more_than(self, count: int) -> bool:
        """Whether numbers show that all that is visible is among the first `count` keys."""
        end = self.key_length if self.offset is None else self.query_length + self.offset
        return self.behind is None and min(end, self.key_length) <= count

    def at_the_end(self, key: Tensor, value: Tensor) -> tuple[Visibility, Tensor, Tensor]:
        """(this, key, value) with the keys moved so that the last query's own is the last: an offset in numbers."""
        if self.behind is None:
            return self, key, value
        # What stood behind comes to stand before the first key, where `starts` hides it.
        places = torch.arange(self.key_length, device=key.device) - self.behind.to(key.device)
        at = places.clamp(min=0)
        starts = places.new_zeros(key.shape[0]) if self.starts is None else self.starts
        seen = replace(
            self,
            offset=self.key_length - self.query_length,
            padding=None if self.padding is None else self.padding[:, at],
            mask=None if self.mask is None else self.mask[..., at],
            starts=starts + self.behind,
            behind=None,
        )
        return seen, key.index_select(2, at), value.index_select(2, at)

    def in_a_mask(self, device: torch.device) -> Visibility:
        """The same without `behind`: the diagonal is part of the mask."""
        if self.behind is None:
            return self
        last = self.key_length - self.query_length - self.behind
        mask = self._diagonal(last, self.key_length, device)
        return replace(self, mask=mask if self.mask is None else self.mask & mask, behind=None)

    def _diagonal(self, offset: int | Tensor, keys: int, device: torch.device) -> Tensor:
        """bool [Tq, keys]: query i sees keys 0 … i + offset."""
        queries = torch.arange(self.query_length, device=device)
        return torch.arange(keys, device=device) <= (queries + offset).unsqueeze(-1)

    def dense_attention(self, query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any]) -> Tensor:
        """Attention to all that is visible: [B, Hq, Tq, Dv]; `scores` as `scores_of` gives them."""
        seen = self.in_a_mask(query.device)
        if seen.reach is not None:
            parts = seen._windows(seen.reach)
            return torch.cat(
                [
                    s.dense_attention(query[:, :, q], key[:, :, k], value[:, :, k], scores)
                    for s, q, k in parts
                ],
                2,
            )
        if len(scores) > 1:  # of which scaled_dot_product_attention knows nothing
            rule = seen.rule(share="none", **scores)
            return select_and_attend(query, key, value, key.shape[2], Exact(), rule)
        offset, keys = seen.offset, self.key_length
        if offset is not None:
            # Keys behind the last query's diagonal (of a static cache, say) are seen by none.
            keys = max(0, min(keys, self.query_length + offset))
            key, value = key[:, :, :keys], value[:, :, :keys]
        mask = seen.of_first_keys(keys)._masks()
        if seen.starts is not None:
            after = torch.arange(keys, device=key.device) >= seen.starts.view(len(seen.starts), 1, -1, 1)
            mask = after if mask is None else mask & after
        causal = (
            offset is not None and offset < keys - 1
        )  # else the first query sees them all, and so do the others
        if causal and (mask is not None or offset != 0):
            diagonal = self._diagonal(offset or 0, keys, query.device)
            mask, causal = diagonal if mask is None else mask & diagonal, False
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scores["scale"],
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _windows(self, reach: int) -> Iterator[tuple[Visibility, slice, slice]]:
        """(what they see, some queries, the keys within their sliding windows): far fewer than all pairs."""
        assert self.starts is not None
        assert self.offset is not None
        step = max(reach, _QUERIES)
        for first in range(0, self.query_length, step):
            queries = slice(first, min(first + step, self.query_length))
            keys = slice(
                max(0, first + self.offset - reach + 1), min(self.key_length, queries.stop + self.offset)
            )
            seen = replace(
                self,
                query_length=queries.stop - first,
                key_length=keys.stop - keys.start,
                offset=first + self.offset - keys.start,
                starts=self.starts[:, queries] - keys.start,
                reach=None,
            )
            yield seen, queries, keys

    def only_visible(self, indices: Tensor) -> Tensor:
        """indices [B, Tq, K] with those of invisible keys made −1: a model's own selection may hold such."""
        seen = self.in_a_mask(indices.device)
        inside = (indices >= 0) & (indices < self.key_length)
        visible = inside
        if seen.offset is not None:
            last = torch.arange(self.query_length, device=indices.device) + seen.offset
            visible = visible & (indices <= last[:, None])
        if seen.starts is not None:
            visible = visible & (indices >= seen.starts.view(len(seen.starts), -1, 1))
        places = torch.where(inside, indices, 0).long()
        for mask in (seen.mask, None if seen.padding is None else seen.padding[:, None, None, :]):
            if mask is not None:
                rows = mask[:, 0].expand(indices.shape[0], self.query_length, self.key_length)
                visible = visible & rows.gather(-1, places)
        return torch.where(visible, indices, -1)


def scores_of(scale: float | None, softcap: float | None, sink_logits: Tensor | None) -> dict[str, Any]:
    """What a layer says of its scores, as parts of the rule."""
    said = {"softcap": softcap, "sink_logits": sink_logits}
    return {"scale": scale, **{name: value for name, value in said.items() if value is not None}}


UNORDERED = (
    "window, blocks and residual need causal attention: a query's own key must be the last that it sees"
)


def none_beyond(mask: Tensor, offset: int | Tensor) -> bool:
    """Whether query i of bool [B or 1, 1 or Hq, Tq, Tk] sees no key after i + offset (`holds`)."""
    queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
    return holds(~(mask & (keys > (queries + offset).unsqueeze(-1))).any())


def holds(condition: Tensor, otherwise: str = UNORDERED) -> bool:
    """The value of bool []. Under torch.compile nobody knows it yet: it has to be True, or the program will raise."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    torch._assert_async(condition, f"attn_implementation='sparse_attn' under torch.compile: {otherwise}")
    return True


def holes(tokens: Tensor) -> Tensor:
    """bool []: whether padding stands within a sequence [B, T], not at its ends alone."""
    return (tokens.diff(dim=-1) & tokens[:, 1:]).sum(-1).gt(1 - tokens[:, 0].int()).any()
