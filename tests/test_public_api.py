"""The public names and their signatures, against the committed list: a change of either is a decision, not an accident.

SPARSE_ATTN_WRITE_API=1 pytest tests/test_public_api.py writes the list anew; CONTRIBUTING.md says what may change when.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = (
    "sparse_attn",
    "sparse_attn.nn",
    "sparse_attn.selection",
    "sparse_attn.planner",
    "sparse_attn.analysis",
    "sparse_attn.distillation",
    "sparse_attn.evaluation",
    "sparse_attn.distributed",
    "sparse_attn.integrations.transformers",
)


def signature(thing: object) -> str:
    if inspect.ismodule(thing):
        return ""
    if not callable(thing):
        return f" = {thing!r}"
    # Defaults that are objects print an address; annotations are text, for every file has them from the future.
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))


def methods(name: str, cls: type) -> list[str]:
    """The class's own public methods and properties, those of its bases in this package included."""
    lines = []
    for attribute in sorted(dir(cls)):
        static = inspect.getattr_static(cls, attribute)
        owner = next((c for c in cls.__mro__ if attribute in vars(c)), None)
        if attribute.startswith("_") or owner is None or not owner.__module__.startswith("sparse_attn"):
            continue
        if isinstance(static, property):
            lines.append(f"{name}.{attribute}: property")
        elif callable(getattr(cls, attribute)):
            lines.append(f"{name}.{attribute}{signature(getattr(cls, attribute))}")
    return lines


def public_api() -> list[str]:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            thing, label = getattr(module, name), f"{module_name}.{name}"
            lines.append(label + signature(thing))
            if inspect.isclass(thing):
                lines += methods(label, thing)
    return lines


def test_the_public_api_is_the_committed_one():
    pytest.importorskip("transformers", reason="a part of the API is for it")
    ours = public_api()
    if os.environ.get("SPARSE_ATTN_WRITE_API") == "1":
        SNAPSHOT.write_text("\n".join(ours) + "\n")
    want = SNAPSHOT.read_text().splitlines()
    gone, new = sorted(set(want) - set(ours)), sorted(set(ours) - set(want))
    difference = ["no longer so:", *gone, "new:", *new] if gone or new else []
    assert not difference, "\n".join(difference)
