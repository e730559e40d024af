"""Indexers beside the attention layers of a Hugging Face model: added, run with its cache, saved and loaded.

sparse_transformers.add_indexers(model)                    # untrained; distill_indexers trains them
sparse_transformers.configure(model, top_k=256, selector="indexer")
sparse_transformers.save_indexers(model, "indexers.safetensors")
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from os import PathLike

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.files import parse_json, refusal
from sparse_attn.integrations import index_cache
from sparse_attn.integrations.calls import OfThisCall
from sparse_attn.integrations.options import NAME
from sparse_attn.integrations.reuse import follows
from sparse_attn.integrations.saved import tensors_beside
from sparse_attn.integrations.watching import layer_inputs
from sparse_attn.nn import Indexer
from sparse_attn.selection import FromIndexer

ATTRIBUTE = "sparse_attn_indexer"  # of an attention module: its indexer
of_this_call = OfThisCall("_sparse_attn_index")  # what its indexer made of the hidden states, and the cache
_NEEDED = (
    "selector='indexer' needs an indexer in layer {}: add_indexers and distill_indexers give it one, or load_indexers: "
    "from its file, or from the folder that save_pretrained wrote, which from_pretrained does not do"
)


def attention_layers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Number of the layer → its attention module."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
            continue
        if module.layer_idx in found:
            raise TypeError(
                f"model must have one attention module per layer, got {type(model).__name__} with several for layer "
                f"{module.layer_idx} (encoders with decoders have no indexers and no low-rank scorers)"
            )
        found[module.layer_idx] = module
    if not found:
        raise TypeError(
            f"model must be a transformers decoder whose attention modules have a layer_idx, got {type(model).__name__}"
        )
    return found


def chosen_layers(found: dict[int, torch.nn.Module], layers: Iterable[int] | None) -> list[int]:
    """The numbers in `layers`, all of them those of layers in `found`; None is all."""
    if layers is None:
        return list(found)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be numbers of layers or None, got {checks.describe(layers)}")
    numbers = list(layers)
    for number in numbers:
        if number not in found:
            raise ValueError(f"layers must be among 0 … {max(found)}, got {number!r}")
    return numbers


def add_indexers(
    model: torch.nn.Module,
    *,
    num_heads: int = 4,
    head_dim: int = 32,
    share: str = "all",
    layers: Iterable[int] | None = None,
) -> torch.nn.Module:
    """Gives attention layers of `model` an untrained :class:`sparse_attn.nn.Indexer` each; weights are float32.

    Args:
        model: a transformers decoder.
        num_heads, head_dim: of an indexer; the heads are per group.
        share: "all" (one selection for all heads of a layer) or "kv" (one per key/value head).
        layers: which; None is all.

    Returns:
        the model; its indexers are the attention modules' ``sparse_attn_indexer``.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.
    """
    if share not in ("all", "kv"):
        raise ValueError(f"share must be 'all' or 'kv' for indexers, got {share!r}")
    found = attention_layers(model)
    made = {}
    for number in chosen_layers(found, layers):
        config = found[number].config
        groups = 1 if share == "all" else config.num_key_value_heads
        made[number] = Indexer(config.hidden_size, num_heads, head_dim, groups=groups)
    for number, indexer in made.items():
        _set(found[number], indexer)
    return model


def indexers(model: torch.nn.Module) -> dict[int, Indexer]:
    """Number of the layer → its indexer."""
    found = attention_layers(model) if any(hasattr(m, ATTRIBUTE) for m in model.modules()) else {}
    return {n: getattr(module, ATTRIBUTE) for n, module in found.items() if hasattr(module, ATTRIBUTE)}


def remove_indexers(model: torch.nn.Module) -> None:
    """Leaves the model as it was before :func:`add_indexers`."""
    for module in model.modules():
        if hasattr(module, ATTRIBUTE):
            module._sparse_attn_hook.remove()
            delattr(module, "_sparse_attn_hook")
            delattr(module, ATTRIBUTE)
            of_this_call.drop(module)


def _set(module: torch.nn.Module, indexer: Indexer) -> None:
    device = next(module.parameters()).device
    setattr(module, ATTRIBUTE, indexer.to(device).requires_grad_(False).eval())
    if not hasattr(module, "_sparse_attn_hook"):
        module._sparse_attn_hook = module.register_forward_pre_hook(_before_attention, with_kwargs=True)


def save_indexers(model: torch.nn.Module, path: str | PathLike) -> None:
    """Writes the model's indexers, and nothing else of it, to one safetensors file."""
    from safetensors.torch import save_file

    found = indexers(model)
    if not found:
        raise ValueError("model has no indexers to save: add_indexers adds them")
    tensors = {
        f"{n}.{name}": tensor.contiguous()
        for n, indexer in found.items()
        for name, tensor in indexer.state_dict().items()
    }
    shapes = {n: [i.num_heads, i.head_dim, i.groups] for n, i in found.items()}
    save_file(tensors, path, metadata={"sparse_attn_indexers": json.dumps(shapes)})


def load_indexers(model: torch.nn.Module, path: str | PathLike) -> torch.nn.Module:
    """Adds the indexers of a file that :func:`save_indexers` wrote, or of a folder that `save_pretrained` wrote.

    Raises:
        ValueError: it holds no indexers, not those of such a model, or is broken; the message begins with the
            path, and the model is as it was.
        OSError: the file cannot be read.
    """
    found, made = attention_layers(model), {}
    if os.path.isdir(path):
        for number, state in tensors_beside(path, ATTRIBUTE, model, found).items():
            made[number] = _indexer_of(path, number, _sizes_of(state), state, found)
        shapes, tensors = {}, {}
    else:
        shapes, tensors = _read(path)
    for name, sizes in shapes.items():
        number = int(name) if name.isdecimal() else -1
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        made[number] = _indexer_of(path, number, sizes, state, found)
    for number, indexer in made.items():
        _set(found[number], indexer)
    return model


def _read(path: str | PathLike) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What a file says of its indexers, by layer, and its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sparse_attn_indexers")
            if text is None:
                raise ValueError(f"{path} holds no indexers: save_indexers writes such files")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise refusal(path, "indexers", error) from None
    try:
        shapes = parse_json(text)
    except ValueError as error:
        raise refusal(path, "indexers", error) from None
    if not isinstance(shapes, dict):
        raise refusal(path, "indexers", f"their sizes must be an object, got {checks.describe(shapes)}")
    return shapes, tensors


def _sizes_of(state: dict[str, Tensor]) -> list[int] | None:
    """num_heads, head_dim and groups of an indexer, which its tensors say; None where some are missing."""
    names = "key.weight", "query.weight", "key_norm.weight"  # [G·Di, C], [G·Hi·Di, C], [Di]
    if not all(name in state and state[name].numel() for name in names):
        return None
    keys, queries, head_dim = (len(state[name]) for name in names)
    return [queries // keys, head_dim, keys // head_dim]


def _indexer_of(path, number: int, sizes: object, state: dict[str, Tensor], found: dict) -> Indexer:
    """The indexer of a layer with what a file holds for it, if both fit together and the model."""
    key = state.get("key.weight")
    if not isinstance(sizes, list) or len(sizes) != 3 or key is None or key.dim() != 2:
        raise refusal(path, "indexers", f"it has no sizes or no keys of layer {number}")
    width = key.shape[1]
    if number not in found or found[number].config.hidden_size != width:
        raise ValueError(
            f"{path} has an indexer of layer {number} for hidden states of width {width}, "
            f"which this model of {len(found)} layers does not have"
        )
    try:
        with torch.device("meta"):  # nothing is allocated before the tensors are known to be of these sizes
            indexer = Indexer(width, sizes[0], sizes[1], groups=sizes[2])
        why = indexer._why_not_load(state, "")
        if why is None and state.keys() != indexer.state_dict().keys():
            why = f"it has {', '.join(sorted(state))}, an indexer {', '.join(indexer.state_dict())}"
    except (TypeError, ValueError, RuntimeError) as error:
        why = str(error)
    if why is not None:
        raise refusal(path, f"indexer of layer {number}", why)
    indexer.to_empty(device="cpu").load_state_dict(state)
    return indexer


def uses_indexer(module: torch.nn.Module) -> bool:
    """Whether its config's options make this attention layer select with its indexer."""
    if module.config._attn_implementation != NAME:
        return False
    layers = getattr(module.config, "sparse_attn_layers", None)
    chosen = layers is None or module.layer_idx in layers
    chosen = chosen and not follows(module, getattr(module.config, "sparse_attn_reuse", None))
    return chosen and getattr(module.config, "sparse_attn_selector", "exact") == "indexer"


def index_of(module: torch.nn.Module) -> FromIndexer:
    """What the indexer of an attention module made of this call's hidden states."""
    if not hasattr(module, ATTRIBUTE):
        raise ValueError(_NEEDED.format(module.layer_idx))
    index, past = of_this_call.take(module)
    if past is not None:
        index_cache.keep(past, module.layer_idx, index.key)
    return index


def _before_attention(module: torch.nn.Module, arguments: tuple, named: dict) -> None:
    """A forward pre-hook: attention functions are not given the hidden states that an indexer reads."""
    past = index_cache.cache_among((*arguments, *named.values()))
    if not uses_indexer(module):
        if past is not None:  # its keys are no longer those that the index keys go with
            index_cache.forget(past, module.layer_idx)
        return
    hidden, rope = layer_inputs(arguments, named)
    indexer = getattr(module, ATTRIBUTE)
    hidden = hidden.detach().to(indexer.key.weight.dtype)
    query, weights = indexer.queries(hidden, rope)
    key = indexer.keys(hidden, rope)
    if past is not None:
        key = index_cache.with_those_before(past, module.layer_idx, key)
    of_this_call.put(module, (FromIndexer(query, key, weights), past))


def require_indexers(model: torch.nn.Module, layers: Iterable[int] | None) -> None:
    """That every layer which is to use an indexer has one."""
    have = indexers(model)
    for number in attention_layers(model) if layers is None else layers:
        if number not in have:
            raise ValueError(_NEEDED.format(number))
