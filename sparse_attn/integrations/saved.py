"""What `save_pretrained` wrote of the modules that choose keys: `from_pretrained` knows only those of the model."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor


def tensors_beside(
    folder: str | PathLike, attribute: str, model: torch.nn.Module, found: dict[int, torch.nn.Module]
) -> dict[int, dict[str, Tensor]]:
    """For each attention module, by the number of its layer in `found`, the tensors of its `attribute`, where saved.

    Raises:
        ValueError: the folder holds none, or those of layers that the model does not have.
    """
    from safetensors import safe_open

    numbers = {id(module): number for number, module in found.items()}
    layers = {name: numbers[id(m)] for name, m in model.named_modules() if id(m) in numbers}
    tensors: dict[int, dict[str, Tensor]] = {}
    for file, names in _files(Path(folder)).items():
        with safe_open(file, framework="pt") as opened:
            for name in names if names is not None else opened.keys():
                layer, inside, rest = name.partition(f".{attribute}.")
                if inside:
                    number = _number(layers, layer, folder)
                    tensors.setdefault(number, {})[rest] = opened.get_tensor(name)
    if not tensors:
        raise ValueError(f"{folder} holds nothing called {attribute}: save_pretrained did not write it")
    return tensors


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a folder, and which tensors to read of each; None is all."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(sorted(folder.glob("*.safetensors")))
    files: dict[Path, list[str]] = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        files.setdefault(folder / Path(file).name, []).append(name)  # of this folder, whatever the index says
    return dict(files)


def _number(layers: dict[str, int], saved: str, folder: str | PathLike) -> int:
    """Of the module whose name ends as a saved one does, or begins later: with or without the head's prefix."""
    for name, number in layers.items():
        if f".{saved}".endswith(f".{name}") or f".{name}".endswith(f".{saved}"):
            return number
    raise ValueError(f"{folder} has something for {saved}, which this model does not have")
