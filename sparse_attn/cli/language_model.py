"""The language model and the texts that a command works on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_attn.cli.console import UsageError, refusals, require
from sparse_attn.demo.text import read
from sparse_attn.evaluation import Document

DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or name of a causal model of transformers")
    add("--gguf", metavar="NAME", help="a GGUF file in that folder (needs gguf and accelerate)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model's weights (default float32)")
    add("--device", default="cpu", help="where the model runs (default cpu)")


def load(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    transformers = require("transformers")
    _check_folder(arguments)
    transformers.utils.logging.disable_progress_bar()
    more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **more)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype), **more
        )
    except (OSError, ValueError, ImportError) as error:
        why = " ".join(str(error).split())
        if not Path(arguments.model).exists():
            why = f"there is no such folder, and as a name on the Hugging Face hub: {why}"
        raise UsageError(f"--model {arguments.model} cannot be loaded: {why}") from None
    return model.eval().to(device), tokenizer


def _check_folder(arguments: argparse.Namespace) -> None:
    """What transformers says less clearly of a folder that is not there or lacks what it looks for."""
    folder = Path(arguments.model)
    if not folder.is_dir():
        if folder.is_absolute() or folder.exists() or arguments.model.startswith((".", "~")):
            raise UsageError(f"--model {folder} must be a folder, and there is none of this name")
        return
    files = sorted(path.name for path in folder.glob("*.gguf"))
    there = f"it has {', '.join(files)}" if files else "it has no GGUF file"
    if arguments.gguf and not (folder / arguments.gguf).is_file():
        raise UsageError(f"--gguf {arguments.gguf} is not in {folder}: {there}")
    if not arguments.gguf and not (folder / "config.json").is_file():
        hint = f" ({there}: --gguf NAME)" if files else ""
        raise UsageError(f"--model {folder} has no config.json, which a model of transformers has{hint}")


def name_of(arguments: argparse.Namespace) -> str:
    """The model's, without a folder: those are this machine's."""
    return arguments.gguf or Path(arguments.model).name


def encoder(tokenizer: Any):
    """text → token ids, without any that mark a beginning or an end."""
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def texts_of(files: Sequence[Path], option: str = "--text") -> list[tuple[str, str]]:
    """(name, text) of each file: read before a model is loaded, which takes its time."""
    with refusals(f"{option} "):
        return [(file.name, read(file)) for file in files]


def documents(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Document]:
    """One for each text, by its name."""
    return [
        Document(name, torch.tensor(tokenizer(text).input_ids, dtype=torch.int64)) for name, text in texts
    ]
