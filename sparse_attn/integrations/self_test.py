"""One forward of a few tokens: proves that each attention layer that is meant reaches this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations import refusals
from sparse_attn.integrations.options import needs_order
from sparse_attn.integrations.watching import Given, dense_but_shown

TOKENS = 4


def attention_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """By their names in the model, the innermost modules that are called some sort of attention."""
    found = {n: m for n, m in model.named_modules() if "Attention" in type(m).__name__}
    return {n: m for n, m in found.items() if not any(o.startswith(f"{n}.") for o in found)}


def meant_layers(model: torch.nn.Module, layers: list[int] | None) -> dict[str, torch.nn.Module]:
    """The attention modules that are to be sparse, by name; `layers` must be numbers of such."""
    found = attention_modules(model)
    if layers is None:
        return found
    numbers = {getattr(m, "layer_idx", None) for m in found.values()} - {None}
    for layer in layers:
        if layer not in numbers:
            known = ", ".join(map(str, sorted(numbers))) or "none of its layers has a number"
            raise ValueError(
                f"layers must be numbers of attention layers of this {type(model).__name__} ({known}), got {layer}"
            )
    return {n: m for n, m in found.items() if getattr(m, "layer_idx", None) in layers}


def prove(
    model: torch.nn.Module,
    meant: dict[str, torch.nn.Module],
    options: dict[str, Any],
    inputs: Mapping[str, Any] | None,
) -> None:
    """Refuses a model one of whose layers is not called, or asks for what the options or this package do not have.

    Raises:
        ValueError: naming the layers, and what would work.
    """
    names = {id(module): name for name, module in model.named_modules()}
    called: set[int] = set()

    def look(given: Given) -> None:
        module = given.module
        called.add(id(module))
        layers = options["layers"]
        sparse = layers is None or getattr(module, "layer_idx", None) in layers
        try:
            refusals.refuse_call(module, given.others["dropout"], given.others)
            if sparse and options["top_k"] is not None and needs_order(options):
                refusals.refuse_unordered(given.seen.in_order(), options)
        except ValueError as error:
            raise refusals.Refused(f"layer {names.get(id(module), '?')}: {error}") from None

    with undisturbed(model):
        given = tokens_for(model) if inputs is None else dict(inputs)
        try:
            with dense_but_shown(model, look), torch.no_grad():
                model(**given)
        except refusals.Refused as refused:
            raise ValueError(str(refused)) from None
        except Exception as error:
            raise ValueError(
                f"the self-test, a forward with {', '.join(given)}, failed in the model ({type(error).__name__}: "
                f"{error}): give arguments of a forward that works as self_test={{…}}, or self_test=False"
            ) from error
    missed = [name for name, module in meant.items() if id(module) not in called]
    if not called:
        raise ValueError(
            f"no layer of this {type(model).__name__} calls its attention through transformers' attention interface: "
            "sparse_attn cannot take its place"
        )
    if missed:
        reached = sorted(
            {
                m.layer_idx
                for m in model.modules()
                if id(m) in called and getattr(m, "layer_idx", None) is not None
            }
        )
        raise ValueError(
            f"the self-test did not reach the attention of {', '.join(missed)}: choose among layers={reached}, give "
            "arguments of a forward that reaches them as self_test={…}, or leave it out with self_test=False"
        )


def tokens_for(model: torch.nn.Module) -> dict[str, Tensor]:
    """Arguments of the smallest forward."""
    config, device = model.config, model.device
    text = config.get_text_config()
    name = getattr(model, "main_input_name", "input_ids")
    ids = torch.arange(TOKENS, device=device).remainder(getattr(text, "vocab_size", None) or 1).unsqueeze(0)
    given: dict[str, Any] = {}
    if name == "input_ids":
        given = {"input_ids": ids}
    elif name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        given = {name: torch.zeros(1, config.num_channels, height, width, device=device, dtype=model.dtype)}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        given = {name: torch.zeros(1, config.num_mel_bins, frames, device=device, dtype=model.dtype)}
    else:
        raise ValueError(
            f"self_test must give the arguments of a forward of this {type(model).__name__} ({name}, …), or be False"
        )
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return {**given, "use_cache": False} if hasattr(config, "use_cache") else given


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode but for attention, whose dropout shows in training alone; leaves modes and random states."""
    modes = [(module, module.training) for module in model.modules()]
    attention = {id(module) for module in attention_modules(model).values()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for module, _ in modes:
            if id(module) not in attention:
                module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
