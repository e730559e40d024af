"""Switches of torch that would round our products: off while a call of ours runs, and then as they were.

They belong to the whole process, so calls in several threads count: the last to end puts the switches back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Switches:
    """`attributes` of `torch.backends…` objects, and the values at which nothing is rounded; the first is set."""

    def __init__(self, exact: tuple[Any, ...], *attributes: tuple[Any, str]) -> None:
        self._exact, self._attributes = exact, attributes
        self._lock = threading.Lock()
        self._calls = 0  # that run now with the switches off
        self._before: list[Any] = []

    def _values(self) -> list[Any]:
        return [getattr(backend, name) for backend, name in self._attributes]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Exact products inside; where every switch is off anyhow nothing is touched."""
        with self._lock:
            held = self._calls > 0 or any(value not in self._exact for value in self._values())
            if held:
                if self._calls == 0:
                    self._before = self._values()
                    self._set([self._exact[0]] * len(self._attributes))
                self._calls += 1
        try:
            yield
        finally:
            if held:
                with self._lock:
                    self._calls -= 1
                    if self._calls == 0:
                        self._set(self._before)

    def _set(self, values: list[Any]) -> None:
        for (backend, name), value in zip(self._attributes, values, strict=True):
            setattr(backend, name, value)


# float32 in fewer bits: TensorFloat-32 on NVIDIA GPUs, bfloat16 on CPUs (`torch.set_float32_matmul_precision`).
FLOAT32 = Switches(
    ("ieee", "none"),
    (torch.backends.cuda.matmul, "fp32_precision"),
    (torch.backends.mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined] # made at run time
)
# Sums of bfloat16 products that are rounded to bfloat16 between the parts of a row.
BFLOAT16_SUMS = Switches((False,), (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"))
