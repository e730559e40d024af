"""The pure-PyTorch wing: the definition of every op, the oracle of the tests, the MPS path and the fallback."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from sparse_attn.wings.base import register
from sparse_attn.wings.reference.wing import REFERENCE_WING

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
register(REFERENCE_WING)
