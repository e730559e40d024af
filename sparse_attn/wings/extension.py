"""The compiled extension `sparse_attn._C`, and why it is absent where it is."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def _load() -> tuple[Any, str | None]:
    try:
        return import_module("sparse_attn._C"), None
    except ModuleNotFoundError as error:
        if error.name != "sparse_attn._C":
            raise
        # Left in the package by an install that could not compile.
        note = Path(__file__).resolve().parents[1] / "_no_extension.txt"
        why = note.read_text().strip().splitlines()[0] if note.exists() else "it was never built"
        return None, f"the compiled extension sparse_attn._C is not installed: {why}"
    except ImportError as error:
        return None, f"the compiled extension sparse_attn._C failed to load: {error}"


module, load_error = _load()


def ops_of(wing: str, dispatch_key: str) -> dict[str, Callable | None]:
    """The ops that the extension has registered for a wing, as a `Wing` takes them."""
    if module is None:
        return {}
    names = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    prefix, suffix = "sparse_attn::", f".{wing}"
    return {
        name[len(prefix) : -len(suffix)]: None
        for name in sorted(names)
        if name.startswith(prefix) and name.endswith(suffix)
    }
