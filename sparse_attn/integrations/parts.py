"""A Hugging Face model inside `sparse_attn.distributed.context_parallel`: each rank gives it its part of the positions.

    layout = Layout.zigzag(T, ranks)
    here = layout.local(ids, rank, 1)
    with context_parallel(layout, group):
        model(here, position_ids=layout.positions(rank)[None], attention_mask=torch.ones_like(here))

The mask of ones keeps transformers from taking positions that are no neighbours for packed documents; real ones are
`context_parallel(cu_seq=…)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations.options import kept, tail_of
from sparse_attn.integrations.visibility import Visibility
from sparse_attn.ops.shards import state
from sparse_attn.rule import Rule
from sparse_attn.selection import Selector, select_and_attend

INSIDE = "attn_implementation='sparse_attn' inside sparse_attn.distributed.context_parallel"


def is_part() -> bool:
    """Whether the tensors of a layer are a rank's part of a sequence."""
    return state.context is not None


def refuse(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, T_r, D]
    mask: Tensor | Visibility | None,
    causal: bool,
    given: dict[str, Any],  # the other keyword arguments of the layer
    options: dict[str, Any],
    indices: Tensor | None,
) -> None:
    """What a layer cannot do, or would understand wrongly, with a part of its sequence.

    Raises:
        NotImplementedError: in one sentence.
    """
    name = type(module).__name__
    layers = options["layers"]
    if options["top_k"] is None or (layers is not None and getattr(module, "layer_idx", None) not in layers):
        raise NotImplementedError(
            f"{INSIDE} is sparse in every layer: dense attention is torch's own to split"
        )
    if options["reuse"] is not None:
        raise NotImplementedError(f"{INSIDE} selects in every layer: reuse=1")
    if indices is not None:
        raise NotImplementedError(f"{INSIDE} takes no indices of a model's own, which {name} gives")
    if not causal:
        raise NotImplementedError(f"{INSIDE} is causal, which {name} is not")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"{INSIDE} has the keys of its queries alone, got {query.shape[2]} queries and {key.shape[2]} keys: no "
            "decoding from a cache (context_parallel_attention takes a key_layout)"
        )
    bounds = (
        given.get("cu_seq_lens_q") if given.get("cu_seq_lens_q") is not None else given.get("cu_seq_lens_k")
    )
    if bounds is not None:
        raise NotImplementedError(
            f"{INSIDE} has documents by context_parallel(cu_seq=…), not by cu_seq_lens_q"
        )
    positions = given.get("position_ids")
    alone = state.context is None or not state.context.documents
    if alone and isinstance(positions, Tensor) and bool((positions.diff(dim=-1) <= 0).any()):
        raise NotImplementedError(
            f"{INSIDE} has documents by context_parallel(cu_seq=…), got position_ids that begin anew without it"
        )
    if mask is not None:
        raise NotImplementedError(
            f"{INSIDE} takes causal attention without padding, sliding windows or masks, got a mask: attention_mask of "
            "ones keeps transformers from making one of position_ids, and context_parallel(cu_seq=…) has documents"
        )


def attend_part(
    query: Tensor,  # [B, Hq, T_r, D]
    key: Tensor,  # [B, Hkv, T_r, D]
    value: Tensor,  # [B, Hkv, T_r, Dv]
    selector: Selector,
    options: dict[str, Any],
    scores: dict[str, Any],  # parts of the rule
) -> Tensor:  # [B, Hq, T_r, Dv]
    """What the whole sequence's attention is at this rank's queries."""
    rule = Rule(is_causal=True, share=options["share"], **kept(options), **scores)
    tail, backend = tail_of(options), options["backend"]
    return select_and_attend(query, key, value, options["top_k"], selector, rule, tail=tail, backend=backend)
