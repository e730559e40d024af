"""Documents end to end in one row, as a model is told of them: `cu_seq_lens_q` or positions that begin anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks import packed as check
from sparse_attn.integrations.visibility import Visibility, holds

_DIFFERENT = (
    "cu_seq_lens_k must be cu_seq_lens_q: the queries of packed documents are their keys, without a cache"
)


def within_documents(
    seen: Visibility,
    given: dict[str, Any],  # the other keyword arguments of an attention layer
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
) -> Visibility:
    """`seen` within each query's own document, where the layer was told of several.

    Raises:
        TypeError, ValueError: they are not documents that lie end to end in one row and are looked at causally.
    """
    bounds = given.get("cu_seq_lens_q")
    if bounds is None:
        if given.get("cu_seq_lens_k") is not None:
            raise ValueError("cu_seq_lens_k needs cu_seq_lens_q, where each document's queries begin")
        starts = _of_positions(seen, given.get("position_ids"), query, key)
        return seen if starts is None else replace(seen.spelled_out(), starts=starts)
    of_keys = given.get("cu_seq_lens_k")
    tokens = query.transpose(1, 2)[0] if len(query) == 1 else None  # [T, Hq, D]
    if tokens is None or query.shape[2] != key.shape[2]:
        raise ValueError(
            "cu_seq_lens_q takes documents end to end in one row, without a cache, got "
            f"{list(query.shape)} queries and {list(key.shape)} keys"
        )
    check.offsets("cu_seq_lens_q", bounds, tokens, "max_length_q", _longest(given, "max_length_q", query))
    if of_keys is not None and of_keys is not bounds:
        check.offsets(
            "cu_seq_lens_k", of_keys, tokens, "max_length_k", _longest(given, "max_length_k", query)
        )
        if of_keys.shape != bounds.shape or not holds((of_keys == bounds).all(), _DIFFERENT):
            raise ValueError(_DIFFERENT)
    if not seen.in_order().ordered:
        raise ValueError(
            "cu_seq_lens_q needs causal attention, where a query's own key is the last that it sees"
        )
    position = torch.arange(query.shape[2], device=query.device)
    seen = seen.spelled_out()
    # Behind the last document nobody says what there is: one more.
    found = bounds.to(torch.int64)[torch.bucketize(position, bounds[1:].to(torch.int64), right=True)][None]
    return replace(seen, starts=found if seen.starts is None else torch.maximum(found, _each(seen, query)))


def _each(seen: Visibility, query: Tensor) -> Tensor:
    """starts [B] or [B, Tq] as [B, Tq]."""
    assert seen.starts is not None
    starts = seen.starts if seen.starts.dim() == 2 else seen.starts.unsqueeze(1)
    return starts.expand(query.shape[0], query.shape[2])


def _longest(given: dict[str, Any], name: str, query: Tensor) -> int:
    """What the layer was told, a number or a tensor of one; else no more than there is."""
    longest = given.get(name)
    if longest is None or isinstance(longest, Tensor):
        return query.shape[2]
    return checks.integer(name, longest, 0)


def _of_positions(seen: Visibility, positions: object, query: Tensor, key: Tensor) -> Tensor | None:
    """Where each query's document starts, int64 [B, T], where positions [B or 1, T] begin anew; None where not.

    transformers' masks tell of such documents, but not where there is a cache beside them, even an empty one.
    """
    batch, length = query.shape[0], query.shape[2]
    if torch.compiler.is_compiling() or not isinstance(positions, Tensor) or length < 2:
        return None
    # A mask of the user's own may mean something else; of a sliding layer's the starts are known.
    known = seen.starts is None or seen.reach is not None
    plain = seen.offset == 0 and seen.mask is None if known else not _any(seen.starts)
    plain = plain and seen.padding is None
    if not plain or key.shape[2] != length or positions.shape not in ((batch, length), (1, length)):
        return None
    anew = positions[:, 1:] == positions[:, :1]
    if not bool(anew.any()):
        return None
    places = torch.arange(1, length, device=query.device)
    starts = torch.where(anew, places, 0).cummax(-1).values
    return torch.nn.functional.pad(starts, (1, 0)).expand(batch, length)


def _any(starts: Tensor) -> bool:
    return starts.dim() > 1 or bool(starts.any())
