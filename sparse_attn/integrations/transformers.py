"""Top-k attention in Hugging Face models: ``attn_implementation="sparse_attn"``.

    import sparse_attn.integrations.transformers as sparse_transformers

    sparse_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse_attn")
    sparse_transformers.configure(model, top_k=256, window=64, sinks=4)
    model.generate(**tokenizer(text, return_tensors="pt"))

Prefill and decoding are sparse alike, with dynamic and static caches, padding on either side, packed documents and
grouped queries. The options stand in the model's config (``config.sparse_attn_top_k`` …), are saved with it, and may
change between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations import blocks, continuous, parts, refusals
from sparse_attn.integrations import key_index as key_indices
from sparse_attn.integrations import reuse as reused
from sparse_attn.integrations.indexers import (
    add_indexers,
    attention_layers,
    index_of,
    indexers,
    load_indexers,
    remove_indexers,
    save_indexers,
    uses_indexer,
)
from sparse_attn.integrations.low_rank import fit_low_rank, load_low_rank
from sparse_attn.integrations.masks import attention_mask
from sparse_attn.integrations.options import (
    NAME,
    maskless,
    needs_order,
    options_of,
    say_when_saved,
    set_options,
    tail_of,
    unchanged_if_refused,
)
from sparse_attn.integrations.packed import within_documents
from sparse_attn.integrations.selectors import OWN, SELECTORS, check_named, remember, selector_of
from sparse_attn.integrations.self_test import meant_layers, prove
from sparse_attn.integrations.visibility import Visibility, scores_of
from sparse_attn.ops.key_index import KeyIndex
from sparse_attn.ops.shards import refuse_context
from sparse_attn.rule import Rule
from sparse_attn.selection import Exact, Selection, Selector, attend, select_and_attend
from sparse_attn.wings.base import check_name

__all__ = [
    "SELECTORS",
    "add_indexers",
    "configure",
    "fit_low_rank",
    "indexers",
    "load_indexers",
    "load_low_rank",
    "register",
    "remove_indexers",
    "save_indexers",
]


def register() -> None:
    """Makes ``attn_implementation="sparse_attn"`` known to transformers; calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed (``pip install "sparse-attn[hf]"``).
    """
    try:
        from transformers import AttentionInterface, PreTrainedConfig
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f'{error}: pip install "sparse-attn[hf]" (transformers >= 5)') from None
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers makes no mask, and padding would be attended to.
    AttentionMaskInterface.register(NAME, attention_mask)
    say_when_saved(PreTrainedConfig)
    continuous.admit()


def configure(
    model: torch.nn.Module,
    *,
    top_k: int | None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    selector: str | Selector = "exact",
    residual: bool | str = False,
    layers: Iterable[int] | None = None,
    backend: str | None = None,
    key_index: bool = True,
    reuse: int | Iterable[int] = 1,
    self_test: bool | Mapping[str, Any] = True,
) -> torch.nn.Module:
    """Sets the options of every attention layer of `model` and makes it use this package's attention.

    What would mean nothing for this model is refused, by the names of the layers, and a refused call changes nothing.

    Args:
        model: a transformers model.
        top_k: keys per query, the whole budget; None is dense attention, for comparison.
        window: the last `window` keys are always kept; the layers must be causal.
        sinks: the first `sinks` keys of each sequence (behind its padding), or packed document, are always kept.
        share: "none" (a selection per query head), "kv" (per key head), "all" (one for all heads).
        selector: how keys are chosen: "exact" by true q·k, "int8" by q·k of rounded queries and keys
            (:func:`sparse_attn.quantized_select`), "low_rank" by q·k in a few components (:func:`fit_low_rank`),
            "indexer" by each layer's :class:`sparse_attn.nn.Indexer`
            (:func:`add_indexers`, :func:`load_indexers`), whose own groups say who shares; "blocks" takes whole
            blocks of 64 keys for 64 queries at a time (:func:`sparse_attn.block_select`), the first and the
            queries' own among them; "refined_blocks" the top_k keys by q·k of four times as many blocks. For
            both top_k is a multiple of 64, at least 192, and padding stands at the ends of a sequence. Or any object
            that has the `select` of a :class:`sparse_attn.selection.Selector`; it is not saved with the model.
        residual: the attention mass of the keys that are left out goes to the mean of their values
            (``tail="mean"`` of :func:`sparse_attn.topk_attention`): nearer to dense attention, at about its cost.
            "blocks" takes the means of blocks of 64 keys instead (``tail="blocks"``): nearer still with few keys, and
            cheaper; blocks are counted from a row's first position, padding or not. With selections of tokens (all but
            "blocks"), padding at the ends of a sequence.
        layers: numbers of the layers that are sparse; None is all. The others are dense.
        backend: force one wing; None chooses.
        key_index: keep a :class:`sparse_attn.KeyIndex` beside each layer of a key/value cache, where decoding on a CPU
            by exact selection gains by it: the same tokens for D + 12 bytes more a key. False keeps none.
        reuse: every so many sparse layers one selects, and those behind it, up to the next that does, attend to the
            keys that it chose; or the numbers of the layers that select. For models with one attention module a layer;
            layers with one selection see the same keys, and have the same heads unless `share` is "all".
        self_test: run the model once on a few tokens, to see that each attention layer that is meant reaches this
            package and what it asks for. A mapping gives the keyword arguments of that forward, for a model that
            needs more than tokens; False leaves it out, and some refusals to the first forward.

    Returns:
        the model.

    Raises:
        TypeError, ValueError: a wrong argument, or one that this model cannot honour, named in the message.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torch, sparse_attn.integrations.transformers as sparse_transformers
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
        >>> model = sparse_transformers.configure(model, top_k=8, window=2, sinks=1)
        >>> model(torch.arange(20)[None]).logits.shape
        torch.Size([1, 20, 100])
    """
    refuse_context("configure")
    if top_k is not None:
        checks.budget(top_k, window, sinks, True)
    if share not in checks.SHARES:
        raise ValueError(f"share must be one of {', '.join(map(repr, checks.SHARES))}, got {share!r}")
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers must be numbers of layers or None, got {checks.describe(layers)}")
        layers = [checks.integer("layers", layer, 0) for layer in layers]
    if not isinstance(residual, bool) and residual != "blocks":
        raise TypeError(f"residual must be True, False or 'blocks', got {checks.describe(residual)}")
    if residual and selector == "blocks":
        raise ValueError(
            f"residual={residual!r} needs a selection of tokens, got selector='blocks', which takes whole blocks"
        )
    if backend is not None:
        check_name(backend)
    if not isinstance(self_test, Mapping):
        checks.boolean("self_test", self_test)
    reuse = reused.check_reuse(reuse)
    refusals.refuse_no_model(model)
    options = {
        "top_k": top_k,
        "window": window,
        "sinks": sinks,
        "share": share,
        "selector": selector if isinstance(selector, str) else OWN,
        "residual": residual,
        "layers": layers,
        "backend": backend,
        "key_index": checks.boolean("key_index", key_index),
        "reuse": None,
    }
    meant = meant_layers(model, layers)
    refusals.refuse_unreachable(model, meant)
    if reuse != 1:
        options["reuse"] = reused.groups_among(reuse, attention_layers(model), layers)
    check_named(model, selector, options)
    register()
    with unchanged_if_refused(model):
        if self_test is not False or not meant:
            prove(model, meant, options, self_test if isinstance(self_test, Mapping) else None)
        set_options(model, options)
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
    key_indices.follow(model)
    if not isinstance(selector, str):
        remember(model, selector)
    return model


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D], of the whole cache
    value: Tensor,  # [B, Hkv, Tk, Dv]
    attention_mask: Tensor | Visibility | None,  # bool [B, 1 or Hq, Tq, Tk]
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,  # int [B, Tq, K]: the selection of a model that has an indexer of its own
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq]: a logit more in each head's softmax, without a value
    **others,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it: out [B, Tq, Hq, Dv] and no weights."""
    refusals.refuse_call(module, dropout, others)
    if continuous.is_batch(others):
        refuse_context("continuous batching")
        return _continuous(
            module, query, key, value, scores_of(scaling, softcap, s_aux), indices, others
        ), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scores = scores_of(scaling, softcap, s_aux)
    if parts.is_part():
        options = _options_of(module)
        parts.refuse(module, query, key, attention_mask, causal, others, options, indices)
        index = index_of(module) if uses_indexer(module) else None
        selector = selector_of(module, options, index)
        refusals.refuse_sharded(module, query, options, index, selector)
        return parts.attend_part(query, key, value, selector, options, scores).transpose(1, 2), None
    seen = Visibility.of(attention_mask, query, key, causal)
    seen = within_documents(seen, others, query, key)
    if indices is not None:
        chosen = Selection(seen.only_visible(indices))
        out = attend(query, key, value, chosen, rule=Rule(**scores))
        return out.transpose(1, 2), None
    options = _options_of(module)
    # Also where the layer is dense: it is of this call.
    index = index_of(module) if options["selector"] == "indexer" and uses_indexer(module) else None
    if _is_dense(module, key, options, seen.reach):
        return seen.dense_attention(query, key, value, scores).transpose(1, 2), None
    turn = reused.turn_of(module, options, attention_mask, query, key)
    if turn is not None and not turn.selects:
        out = _sparse(query, key, value, turn.chosen(), seen, options, scores)
        return out.transpose(1, 2), None
    selector = selector_of(module, options, index)
    refusals.refuse_sharded(module, query, options, index, selector)
    beside = key_indices.index_of(module, query, key, options)
    out = _sparse(query, key, value, selector, seen, options, scores, beside, turn)
    return out.transpose(1, 2), None


def _options_of(module: torch.nn.Module) -> dict[str, Any]:
    options = options_of(module.config)
    if options["top_k"] is None and not hasattr(module.config, f"{NAME}_top_k"):
        raise ValueError(
            "config.sparse_attn_top_k is not set: say how many keys a query may attend to with "
            "sparse_attn.integrations.transformers.configure(model, top_k=…)"
        )
    return options


def _continuous(
    module: torch.nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, Tk, D]
    value: Tensor,  # [1, Hkv, Tk, Dv]
    scores: dict[str, Any],
    indices: Tensor | None,
    given: dict[str, Any],
) -> Tensor:  # [1, T, Hq, Dv]
    """A layer of continuous batching."""
    if indices is not None:
        raise ValueError(
            "continuous batching with attn_implementation='sparse_attn' has no indices, which "
            f"{type(module).__name__} gives"
        )
    options = _options_of(module)
    selector = None
    if not _is_dense(module, key, options):
        continuous.refuse(options)
        selector = selector_of(module, options, None)
        refusals.refuse_sharded(module, query, options, None, selector)
    return continuous.attend_batch(module, query, key, value, given, options, scores, selector).transpose(
        1, 2
    )


def _is_dense(module: torch.nn.Module, key: Tensor, options: dict, reach: int | None = None) -> bool:
    """Whether a layer attends to all keys that it sees: it was asked to, or its budget holds them all."""
    top_k, layers = options["top_k"], options["layers"]
    return (
        top_k is None
        or top_k >= (key.shape[2] if reach is None else min(reach, key.shape[2]))
        or (layers is not None and getattr(module, "layer_idx", None) not in layers)
    )


def _sparse(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    selector: Selector,
    seen: Visibility,
    options: dict[str, Any],
    scores: dict[str, Any],  # parts of the rule
    index: KeyIndex | None = None,  # of the first keys, for exact selection
    turn: reused.Turn | None = None,  # what it chooses is for other layers, too
) -> Tensor:  # [B, Hq, Tq, Dv]
    sinks = max(0, options["sinks"] - seen.dropped)
    if sinks:
        seen = seen.spelled_out()  # they are the sequence's, not the window's
    known = reused.known_of(selector)
    if known is not None and seen.behind is not None:
        # The index keys are those of the queries and of what came before, whatever room a static cache has.
        seen = replace(seen, offset=known - seen.query_length, behind=None)
    if needs_order(options):
        seen, key, value = seen.in_order().at_the_end(key, value)
        refusals.refuse_unordered(seen, options)
        if maskless(options["selector"], options["residual"]):
            seen = refusals.without_padding_behind(seen)
        if options["selector"] == "blocks" and blocks.holds_documents(seen, query, key):
            return blocks.attend_documents(query, key, value, seen, options, scores, selector, turn)
    else:
        seen = seen.in_a_mask(query.device)
    if sinks:
        seen = seen.with_starts(query.shape[0])
    if known is not None:
        if seen.offset is not None and known < min(key.shape[2], query.shape[2] + seen.offset):
            raise ValueError(
                f"selector='indexer' has {known} index keys for {key.shape[2]} keys: this layer's keys "
                "come from a cache that is no transformers.Cache"
            )
        # A static cache holds more keys than the indexer has seen; no query sees those.
        seen = seen.of_first_keys(known)
    if index is not None and seen.sees_no_more_than(index.length):
        seen = seen.of_first_keys(index.length)
        key, value = key.narrow(2, 0, index.length), value.narrow(2, 0, index.length)
        selector = Exact(options["backend"], index)
    if turn is not None:
        selector = turn.leaving(selector, known)
    rule = seen.rule(share=options["share"], window=options["window"], sinks=sinks, **scores)
    return select_and_attend(
        query, key, value, options["top_k"], selector, rule, tail=tail_of(options), backend=options["backend"]
    )
