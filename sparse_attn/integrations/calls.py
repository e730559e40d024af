"""What a forward pre-hook of an attention module leaves for the attention function of the same call."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch


class OfThisCall:
    """One thing for each module, and for each thread that runs it: copies and pickles of the model know nothing of it.

    A compiler knows nothing of threads; in a graph it is an attribute of the module for as long as the call takes.
    """

    def __init__(self, attribute: str) -> None:
        self.attribute, self.of_thread = attribute, threading.local()

    def put(self, module: torch.nn.Module, value: Any) -> None:
        if torch.compiler.is_compiling():
            setattr(module, self.attribute, value)
        else:
            self._modules()[module] = value

    def take(self, module: torch.nn.Module, default: Any = None) -> Any:
        """What was put, once: nothing of a call outlives it."""
        if hasattr(module, self.attribute):
            value = getattr(module, self.attribute)
            delattr(module, self.attribute)
            return value
        return default if torch.compiler.is_compiling() else self._modules().pop(module, default)

    def drop(self, module: torch.nn.Module) -> None:
        self.take(module)

    def _modules(self) -> WeakKeyDictionary[torch.nn.Module, Any]:
        if not hasattr(self.of_thread, "modules"):
            self.of_thread.modules = WeakKeyDictionary()
        return self.of_thread.modules
