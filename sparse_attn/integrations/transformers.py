"""Top-k attention in Hugging Face models: ``attn_implementation="sparse_attn"``.

    import sparse_attn.integrations.transformers as sparse_transformers

    sparse_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse_attn")
    sparse_transformers.configure(model, top_k=256, window=64, sinks=4)
    model.generate(**tokenizer(text, return_tensors="pt"))

Prefill and decoding are sparse alike, with dynamic and static caches, padding on either side and grouped queries.
The options stand in the model's config (``config.sparse_attn_top_k`` …), are saved with it, and may change between
calls.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.integrations.indexers import (
    add_indexers,
    index_of,
    indexers,
    load_indexers,
    remove_indexers,
    save_indexers,
    uses_indexer,
)
from sparse_attn.integrations.low_rank import fit_low_rank
from sparse_attn.integrations.selectors import SELECTORS, named, row_of, selector_of
from sparse_attn.integrations.visibility import CausalMask, Visibility, attention_mask, last_visible
from sparse_attn.ops.gathered_attention import gathered_attention
from sparse_attn.selection import Blocks, FromIndexer, Refined, Selector, select_and_attend

__all__ = [
    "SELECTORS",
    "add_indexers",
    "configure",
    "fit_low_rank",
    "indexers",
    "load_indexers",
    "register",
    "remove_indexers",
    "save_indexers",
]

NAME = "sparse_attn"
_DEFAULTS = {
    "top_k": None,
    "window": 0,
    "sinks": 0,
    "share": "none",
    "selector": "exact",
    "residual": False,
    "layers": None,
    "backend": None,
}


def register() -> None:
    """Makes ``attn_implementation="sparse_attn"`` known to transformers; calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed (``pip install "sparse-attn[hf]"``).
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f'{error}: pip install "sparse-attn[hf]" (transformers >= 5)') from None
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers makes no mask, and padding would be attended to.
    AttentionMaskInterface.register(NAME, attention_mask)


def configure(
    model: torch.nn.Module,
    *,
    top_k: int | None,
    window: int = 0,
    sinks: int = 0,
    share: str = "none",
    selector: str | Selector = "exact",
    residual: bool = False,
    layers: Iterable[int] | None = None,
    backend: str | None = None,
) -> torch.nn.Module:
    """Sets the options of every attention layer of `model` and makes it use this package's attention.

    Args:
        model: a transformers model.
        top_k: keys per query, the whole budget; None is dense attention, for comparison.
        window: the last `window` keys are always kept.
        sinks: the first `sinks` keys of each sequence are always kept (behind its padding, if any).
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
            (:func:`sparse_attn.topk_attention_with_residual`): nearer to dense attention, slower than it. With
            selector="exact" alone, padding at the ends of a sequence.
        layers: numbers of the layers that are sparse; None is all. The others are dense.
        backend: force one wing; None chooses.

    Returns:
        the model.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torch, sparse_attn.integrations.transformers as sparse_transformers
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))
        >>> model = sparse_transformers.configure(model, top_k=8, window=2, sinks=1)
        >>> model(torch.arange(20)[None]).logits.shape
        torch.Size([1, 20, 100])
    """
    if top_k is not None:
        checks.budget(top_k, window, sinks, True)
    if share not in checks.SHARES:
        raise ValueError(f"share must be one of {', '.join(map(repr, checks.SHARES))}, got {share!r}")
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers must be numbers of layers or None, got {checks.describe(layers)}")
        layers = [checks.integer("layers", layer, 0) for layer in layers]
    if checks.boolean("residual", residual) and selector != "exact":
        raise ValueError(f"residual=True needs selector='exact', got {checks.describe(selector)}")
    selector = named(model, selector, top_k, {"window": window, "sinks": sinks}, layers)
    values = (top_k, window, sinks, share, selector, residual, layers, backend)
    options = dict(zip(_DEFAULTS, values, strict=True))
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    if not configs:
        raise TypeError(f"model must be a transformers model (it has no config), got {type(model).__name__}")
    for config in configs.values():
        for name, value in options.items():
            setattr(config, f"{NAME}_{name}", value)
    register()
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    return model


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D], of the whole cache
    value: Tensor,  # [B, Hkv, Tk, Dv]
    attention_mask: Tensor | CausalMask | None,  # bool [B, 1 or Hq, Tq, Tk]
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,  # int [B, Tq, K]: the selection of a model that has an indexer of its own
    **others,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it: out [B, Tq, Hq, Dv] and no weights."""
    _refuse(dropout, others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen = Visibility.of(attention_mask, query, key, causal)
    if indices is not None:
        out = gathered_attention(query, key, value, seen.only_visible(indices), scale=scaling)
        return out.transpose(1, 2), None
    options = {name: getattr(module.config, f"{NAME}_{name}", value) for name, value in _DEFAULTS.items()}
    if options["top_k"] is None and not hasattr(module.config, f"{NAME}_top_k"):
        raise ValueError(
            "config.sparse_attn_top_k is not set: say how many keys a query may attend to with "
            "sparse_attn.integrations.transformers.configure(model, top_k=…)"
        )
    index = (
        index_of(module) if uses_indexer(module) else None
    )  # also where the layer is dense: it is of this call
    if _is_dense(module, key, options):
        out = seen.dense_attention(query, key, value, scaling)
    else:
        selector = selector_of(module, options, _kept(options), index)
        out = _sparse(query, key, value, selector, seen, options, scaling)
    return out.transpose(1, 2), None


def _refuse(dropout: float, others: dict) -> None:
    """Whatever would be ignored silently is an error."""
    if dropout:
        raise ValueError(
            f"attn_implementation='sparse_attn' has no attention dropout, got dropout={dropout}: "
            "set the model's attention_dropout to 0"
        )
    for name in ("softcap", "position_bias", "s_aux", "head_mask", "cache"):
        if others.get(name) is not None:
            raise ValueError(
                f"attn_implementation='sparse_attn' has no {name}, which this model's layers need"
            )


def _is_dense(module: torch.nn.Module, key: Tensor, options: dict) -> bool:
    """Whether a layer attends to all keys: it was asked to, or its budget holds them all."""
    top_k, layers = options["top_k"], options["layers"]
    return top_k is None or top_k >= key.shape[2] or (layers is not None and module.layer_idx not in layers)


def _kept(options: dict) -> dict[str, int]:
    """What is always kept."""
    return {name: options[name] for name in ("window", "sinks")}


def _sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selector: Selector,
    seen: Visibility,
    options: dict,
    scale: float | None,
) -> Tensor:
    if options["window"] and not seen.is_causal:
        seen = last_visible(seen, query)
    maskless = options["residual"] or isinstance(selector, (Blocks, Refined))
    if maskless:
        seen = seen.without_padding_behind()
    starts = seen.starts() if options["sinks"] or maskless else None
    if starts is None or not any(starts):
        return _attend(query, key, value, selector, seen, options, scale, maskless)
    # Sequences that begin at different keys: sinks are the first of each, so each has a call of its own.
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    for b, start in enumerate(starts):
        row, first = seen.row(b, start)
        one = slice(b, b + 1)
        sequence = query[one, :, first:], key[one, :, start:], value[one, :, start:]
        if row.query_length > 0 and row.key_length > 0:
            part = row_of(selector, b, first, start)
            out[one, :, first:] = _attend(*sequence, part, row, options, scale, maskless)
    return out


def _attend(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    selector: Selector,
    seen: Visibility,
    options: dict,
    scale: float | None,
    maskless: bool,
) -> Tensor:  # [B, Hq, Tq, Dv]
    if isinstance(selector, FromIndexer):
        known = selector.key.shape[2]
        if seen.is_causal and known < min(key.shape[2], query.shape[2] + seen.offset):
            raise ValueError(
                f"selector='indexer' has {known} index keys for {key.shape[2]} keys: this layer's keys "
                "come from a cache that is no transformers.Cache"
            )
        # A static cache holds more keys than the indexer has seen; no query sees those.
        seen = seen.of_first_keys(known)
    rule = seen.rule(scale, masked=not maskless, share=options["share"], **_kept(options))
    tail = "mean" if options["residual"] else "none"
    return select_and_attend(
        query, key, value, options["top_k"], selector, rule, tail=tail, backend=options["backend"]
    )
