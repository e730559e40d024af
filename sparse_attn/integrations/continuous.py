"""Continuous batching (`generate_batch`): many requests in one row, each with keys of its own from a cache in pages.

transformers lays the new tokens of all requests end to end, writes their keys to its pages, and hands each layer the
keys of all requests end to end, as it does for flash-attention; `cu_seq_lens_q` and `cu_seq_lens_k` say whose is what.
That is a packed call. Which implementations may be used so stands in a list within
`ContinuousBatchingManager.switch_to_cb_friendly_attn`, which would put flash-attention in the place of any other where
it is installed; `admit` lets models that were set to this one keep it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations.options import NAME, kept
from sparse_attn.ops.varlen import sequences
from sparse_attn.selection import Exact, Selector, select_and_attend

_ADMITTED = "_sparse_attn_admitted"
SELECTORS = ("exact", "int8", "low_rank", "own")


def admit() -> None:
    """Lets continuous batching take ``attn_implementation="sparse_attn"``; calling it again changes nothing.

    A transformers without that list refuses the name in words of its own.
    """
    try:
        from transformers.generation.continuous_batching import ContinuousBatchingManager
    except ImportError:
        return
    switch = getattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
    if switch is None or hasattr(switch, _ADMITTED):
        return

    @functools.wraps(switch)
    def keep_ours(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if model.config._attn_implementation == NAME:
            return None
        return switch(self, model, *arguments, **options)

    setattr(keep_ours, _ADMITTED, True)
    ContinuousBatchingManager.switch_to_cb_friendly_attn = keep_ours


def is_batch(given: dict[str, Any]) -> bool:
    """Whether a layer's other keyword arguments are those of continuous batching."""
    return given.get("read_index") is not None and given.get("write_index") is not None


def attend_batch(
    module: torch.nn.Module,
    query: Tensor,  # [1, Hq, T, D], the new tokens of all requests
    key: Tensor,  # [1, Hkv, Tk, D], all tokens of all requests
    value: Tensor,  # [1, Hkv, Tk, Dv]
    given: dict[str, Any],
    options: dict[str, Any],
    scores: dict[str, Any],  # parts of the rule
    selector: Selector | None,  # None: the layer is dense
) -> Tensor:  # [1, Hq, T, Dv]
    """Each request's queries over its own keys; the last query sees the last key.

    Raises:
        ValueError: an option that needs more than that.
    """
    if given.get("block_table") is not None:
        raise ValueError(
            "attn_implementation='sparse_attn' takes the keys of continuous batching from its varlen path: set "
            "max_blocks_per_request=0 in the ContinuousBatchingConfig"
        )
    if given.get("sliding_window") is not None or getattr(module, "sliding_window", None) is not None:
        raise ValueError(
            "continuous batching with attn_implementation='sparse_attn' takes layers of full attention, and "
            f"{type(module).__name__} has a sliding window: configure(window=…) keeps the last keys instead"
        )
    refuse(options)
    where = sequences(
        *(t[0].transpose(0, 1) for t in (query, key)),
        given["cu_seq_lens_q"],
        given["cu_seq_lens_k"],
        int(given["max_length_q"]),
        int(given["max_length_k"]),
        is_causal=True,
        window=0,
        seqused_k=None,
    )
    if selector is None:
        rule = where.rule(**scores)
        top_k, selector = max(1, where.longest), Exact(options["backend"])
    else:
        top_k = options["top_k"]
        rule = where.rule(**kept(options), share=options["share"], **scores)
    return select_and_attend(query, key, value, top_k, selector, rule, backend=options["backend"])


def refuse(options: dict[str, Any]) -> None:
    """What a packed call over a cache has not learned."""
    if options["selector"] not in SELECTORS:
        raise ValueError(
            "continuous batching takes selector='exact', 'int8', 'low_rank' or one of your own, "
            f"got {options['selector']!r}"
        )
    if options["residual"]:
        raise ValueError("continuous batching takes residual=False")
    if options["reuse"] is not None:
        raise ValueError("continuous batching selects in every layer: reuse=1")
