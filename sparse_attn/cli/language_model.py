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
    transformers.utils.logging.disable_progress_bar()
    more = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **more)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype), **more
        )
    except (OSError, ValueError, ImportError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"--model {arguments.model} cannot be loaded: {why}") from None
    return model.eval().to(device), tokenizer


def name_of(arguments: argparse.Namespace) -> str:
    """The model's, without a folder: those are this machine's."""
    return arguments.gguf or Path(arguments.model).name


def encoder(tokenizer: Any):
    """text → token ids, without any that mark a beginning or an end."""
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def documents(tokenizer: Any, files: Sequence[Path], option: str = "--text") -> list[Document]:
    """One for each file, by its name."""
    with refusals(f"{option} "):
        texts = [(file.name, read(file)) for file in files]
    return [Document(name, torch.tensor(tokenizer(text).input_ids)) for name, text in texts]
