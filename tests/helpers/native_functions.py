"""Which aten ops have a kernel on a backend, read from the native_functions.yaml that ships with torch.

The file's layout is fixed (two spaces for a field, more for an entry of `dispatch`), so a few lines read it and
no YAML package is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torchgen

# A composite kernel is made of other ops and runs on every backend that has those.
COMPOSITE = {
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}


@dataclass
class NativeFunction:
    structured_delegate: str | None = None
    dispatch: set[str] = field(default_factory=set)  # dispatch keys, one by one
    says_dispatch: bool = False


def parse(text: str) -> dict[str, NativeFunction]:
    """`name.overload` → its entry."""
    functions = {}
    for block in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        signature, *lines = block.splitlines()
        entry = functions[signature.split("(")[0].strip()] = NativeFunction()
        section = None
        for line in lines:
            line = line.split("#")[0].rstrip()
            name, _, value = line.strip().partition(":")
            if line.startswith("  ") and not line.startswith("   "):
                section = name
                if name == "structured_delegate":
                    entry.structured_delegate = value.strip()
                entry.says_dispatch |= name == "dispatch"
            elif section == "dispatch" and value:
                entry.dispatch |= {key.strip() for key in name.split(",")}
    return functions


@cache
def native_functions() -> dict[str, NativeFunction]:
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    return parse(path.read_text())


def has_kernel(op: str, backend: str, functions: dict[str, NativeFunction] | None = None) -> bool:
    """Whether `op` (as `sort.stable`) runs on dense tensors of the backend (as `MPS`)."""
    entry = (native_functions() if functions is None else functions)[op]
    if backend in entry.dispatch or entry.dispatch & COMPOSITE:
        return True
    if entry.structured_delegate is not None:  # its kernel is the out variant's
        return has_kernel(entry.structured_delegate, backend, functions)
    return not entry.says_dispatch  # without one it is composite
