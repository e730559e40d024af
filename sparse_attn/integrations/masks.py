"""The mask function of ``attn_implementation="sparse_attn"``: what transformers asks for becomes a `Visibility`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.integrations.options import needs_order, options_of
from sparse_attn.integrations.visibility import Visibility, holds, holes, none_beyond

_PAIRS = 1 << 22  # of queries and keys that are looked at at a time


def attention_mask(
    *,
    batch_size: int = 1,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | Visibility | None = None,  # bool [B, keys seen so far], True = a token
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others,
) -> Tensor | Visibility | None:
    """What transformers passes to every layer as `attention_mask`: asked once per forward for all layers of a kind.

    Causal visibility, padding, packed documents and sliding windows stay numbers, without a [Tq, Tk] tensor. What is
    more (prefixes, a user's own, sliding windows beside padding, packed documents or torch.compile) is the boolean
    mask of scaled_dot_product_attention, with what is known about it.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if isinstance(attention_mask, Visibility):
        return attention_mask  # made in advance by generate()
    counted = isinstance(q_offset, Tensor)  # by a static cache
    if counted and q_offset.device.type == "cpu" and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # costs nothing there
    offset = q_offset - kv_offset
    known = not isinstance(offset, Tensor)
    place: dict[str, Any] = {"offset": offset} if known else {"behind": kv_length - q_length - offset}
    skip = allow_is_causal_skip or (counted and q_length == 1)  # False: the model reads the mask as a tensor
    lengths = q_length, kv_length

    if mask_function is causal_mask_function and skip:
        starts, padding = ends_of(attention_mask, kv_length, kv_offset)
        if known and starts is None and q_length in (1, kv_length) and offset == kv_length - q_length:
            return None  # the shapes alone tell
        return Visibility(*lengths, starts=starts, padding=padding, **place)
    if mask_function is bidirectional_mask_function and not use_vmap:
        starts, padding = ends_of(attention_mask, kv_length, kv_offset, causal=False)
        return None if starts is None else Visibility(*lengths, starts=starts, padding=padding)

    if local_size is not None and known and skip and not use_vmap and not torch.compiler.is_compiling():
        plain = ends_of(attention_mask, kv_length, kv_offset)[0] is None
        if plain and offset >= 0 and slides(mask_function, local_size, q_length, q_offset, device):
            return sliding(local_size, batch_size, q_length, kv_length, offset, kv_offset, device)

    wants_order = needs_order(options_of(config))
    alone = attention_mask is None and known and offset == 0 and q_length == kv_length
    packed = alone and mask_function is not causal_mask_function and not skip and not use_vmap
    # Packed documents, or blocks that look ahead; under torch.compile nobody knows yet whether there are several.
    if packed and local_size is None and (wants_order or not torch.compiler.is_compiling()):
        starts = documents(mask_function, batch_size, q_length, device)
        if starts is not None:
            return Visibility(*lengths, offset=0, starts=starts)
    made = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **others,
    )
    if made is None or mask_function is causal_mask_function:
        return made
    order = wants_order and none_beyond(made, offset)
    starts = None
    if local_size is not None and local_size != getattr(config, "attention_chunk_size", None):
        # Sliding windows: the first keys are those of the sequence, where they can still be seen.
        neighbours = made[:, 0].diagonal(-1, -2, -1) if packed else None
        starts = (
            ends_of(attention_mask, kv_length, kv_offset)[0] if neighbours is None else starts_of(neighbours)
        )
        if starts is None:
            starts = torch.zeros((batch_size,), dtype=torch.int64, device=made.device)
    if not order and starts is None:
        return made
    return Visibility(*lengths, mask=made, starts=starts, dropped=kv_offset, **(place if order else {}))


def slides(mask_function, reach: int, queries: int, q_offset: int, device) -> bool:
    """Whether a mask of transformers' own making is causal attention to the last `reach` keys: its edges tell."""
    nothing = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    own = torch.arange(queries, device=device).view(1, 1, -1, 1) + q_offset
    keys = torch.cat((own + 1, own, own - reach + 1, own - reach), -1)
    sees = torch.as_tensor(mask_function(nothing, nothing, own, keys), device=device).expand(1, 1, queries, 4)
    wanted = torch.tensor([False, True, True, False], device=device)
    return bool(((sees == wanted) | (keys < 0)).all())


def sliding(
    reach: int, batch: int, queries: int, keys: int, offset: int, dropped: int, device
) -> Visibility | None:
    """A sliding window in numbers; None where it shows all that causal attention does and the shapes alone tell."""
    if queries + offset <= reach:  # it begins nowhere behind the first key
        alone = dropped == 0 and queries in (1, keys) and offset == keys - queries
        return None if alone else Visibility(queries, keys, offset, dropped=dropped)
    first = torch.arange(queries, device=device) + (offset - reach + 1)
    return Visibility(queries, keys, offset, starts=first.expand(batch, -1), dropped=dropped, reach=reach)


def ends_of(
    tokens: Tensor | None,  # bool [B, keys seen so far], True = a token
    kv_length: int,
    kv_offset: int,
    causal: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(the first token of each sequence, int64 [B], counted from key `kv_offset`; the padding, bool [B, Tk]).

    None where there is no padding; the padding also where the first token says it all: with `causal`, padding behind
    a sequence is in the future of all its queries, and what padded queries see is of no interest.
    """
    if tokens is None:
        return None, None
    first = tokens.to(torch.uint8).argmax(-1)
    missing = kv_offset + kv_length - tokens.shape[-1]
    padding = pad(tokens, (0, max(0, missing)))[:, kv_offset : kv_offset + kv_length]
    if not torch.compiler.is_compiling():
        if bool(tokens.all()) and (causal or missing <= 0):
            return None, None
        if causal and not bool(holes(tokens)):
            padding = None
    return first - kv_offset, padding


def documents(mask_function, batch: int, length: int, device) -> Tensor | None:
    """int64 [B, T]: where each query's document starts, if `mask_function` is causal attention within documents.

    It is asked for every pair, some queries at a time: no [T, T] tensor is stored.
    """
    rows = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    places = torch.arange(length, device=device).view(1, 1, 1, -1)
    nothing = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    before, behind = places[..., :-1], places[..., 1:]
    starts = starts_of(mask_function(rows, nothing, behind, before).expand(batch, 1, 1, length - 1)[:, 0, 0])
    compiling = torch.compiler.is_compiling()
    step = length if compiling else max(1, _PAIRS // max(1, batch * length))
    for first in range(0, length, step):
        queries = places[..., first : first + step].mT
        begin = starts[:, first : first + step].view(batch, 1, -1, 1)
        wanted = (places <= queries) & (places >= begin)
        if not holds((mask_function(rows, nothing, queries, places) == wanted).all()):
            return None
    return starts


def starts_of(sees: Tensor) -> Tensor:
    """bool [B, T − 1], whether query i + 1 sees key i → int64 [B, T]: where each query's document starts."""
    positions = torch.arange(1, sees.shape[1] + 1, device=sees.device)
    return pad(torch.where(sees, 0, positions).cummax(-1).values, (1, 0))
