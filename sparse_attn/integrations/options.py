"""The options of a Hugging Face model: they stand in its configs as ``sparse_attn_<name>``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

NAME = "sparse_attn"  # of the attention implementation
DEFAULTS: dict[str, Any] = {
    "top_k": None,
    "window": 0,
    "sinks": 0,
    "share": "none",
    "selector": "exact",
    "residual": False,
    "layers": None,
    "backend": None,
    "key_index": True,
    "reuse": None,
}
# Arguments of other attention functions that change what comes out.
UNKNOWN = (
    "position_bias",
    "relative_position_bias",
    "token_attention_bias",
    "head_mask",
    "sinks",
    "block_indices",
    "cache",
)
_MARK = "attn_implementation"  # in a saved config: what from_pretrained is to use
_INTERNAL = "_attn_implementation_internal"
_FIELDS = [f"{NAME}_{name}" for name in DEFAULTS]


def options_of(config: Any) -> dict[str, Any]:
    """The options by name, with defaults for what the config does not say."""
    # Each layer of each token asks, and to ask a config of transformers by name takes its time.
    said = getattr(config, "__dict__", {})
    return {
        name: said[field] if field in said else getattr(config, field, value)
        for (name, value), field in zip(DEFAULTS.items(), _FIELDS, strict=True)
    }


def needs_order(options: dict[str, Any]) -> bool:
    """Whether the options need to know which key is a query's own."""
    return options["window"] > 0 or maskless(options["selector"], options["residual"])


def maskless(selector: object, residual: bool | str) -> bool:
    """Whether a selection takes no mask: what a query sees must be a range of keys."""
    return bool(residual) or selector in ("blocks", "refined_blocks")


def tail_of(options: dict[str, Any]) -> str:
    """What becomes of the keys that are left out, in the word of `attend`."""
    residual = options["residual"]
    return ("mean" if residual else "none") if isinstance(residual, bool) else str(residual)


def kept(options: dict[str, Any]) -> dict[str, int]:
    """What is always kept."""
    return {name: options[name] for name in ("window", "sinks")}


def configs_of(model: torch.nn.Module) -> list[Any]:
    """Each config of the model and its parts, once."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


def set_options(model: torch.nn.Module, options: dict[str, Any]) -> None:
    for config in configs_of(model):
        for name, value in options.items():
            setattr(config, f"{NAME}_{name}", value)


def _attention_of(config: Any) -> str | dict[str, Any] | None:
    """As transformers takes it: a name for all of a config, or by its parts where some have another; None: no word."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    of_parts = {name: _attention_of(part) for name, part in parts.items() if part is not None}
    own = NAME if config._attn_implementation == NAME else None
    if all(attention == own for attention in of_parts.values()):
        return own
    said = {"": own, **of_parts}
    return {name: attention for name, attention in said.items() if attention is not None}


def say_when_saved(kind: type) -> None:
    """Lets configs of transformers' class `kind` say, once written, that their model has this attention, while it has.

    Transformers writes no config's attention, and loading takes it from there. The moment of writing alone can tell:
    a model that was loaded, or given another attention, has passed through nothing of this package since.
    """
    written = kind.to_dict
    if getattr(written, "_of_sparse_attn", False):
        return

    @wraps(written)
    def to_dict(self) -> dict[str, Any]:
        found, attention = written(self), _attention_of(self)
        return found if attention is None else {**found, _MARK: attention}

    to_dict._of_sparse_attn = True
    kind.to_dict = to_dict


@contextmanager
def unchanged_if_refused(model: torch.nn.Module) -> Iterator[None]:
    """Puts the configs back as they were where anything is raised."""
    fields = [*_FIELDS, _INTERNAL]
    before = [(c, {f: c.__dict__[f] for f in fields if f in c.__dict__}) for c in configs_of(model)]
    try:
        yield
    except BaseException:
        for config, values in before:
            for field in fields:
                config.__dict__.pop(field, None)
            config.__dict__.update(values)
        raise
