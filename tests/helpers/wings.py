"""The wings under test: every registered wing on every device of this machine that it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

import sparse_attn
from sparse_attn.rule import Rule
from sparse_attn.wings import base
from sparse_attn.wings import triton as triton_wing

OPS = ("topk_select", "gathered_attention", "topk_attention")
# Functions that are no ops themselves: the op, and the option of it that a wing may lack.
NEEDS = {
    "topk_attention_with_residual": ("topk_attention", None),
    "quantized_select": ("topk_select", "rounded_scores"),
    "refine_blocks": ("topk_select", "blocks"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WingUnderTest:
    """One wing on one device. Called like the package, with CPU tensors in and out whatever the device.

    Example:
        >>> out, lse = wing.gathered_attention(query, key, value, indices, return_lse=True)
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: str | None = None  # why it cannot run on this machine

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def refuses(
        self, op: str, dtype: torch.dtype = torch.float32, rule: Rule | None = None, **sizes: int
    ) -> str | None:
        """None where the wing takes such a call of the op, else why not."""
        return base.reasons(op, torch.device(self.device), dtype, rule, **sizes)[self.name]

    def _run(self, op: str, *args, **kwargs):
        needs, option = NEEDS.get(op, (op, None))
        own = next(w for w in base.wings() if w.name == self.name)
        if needs not in own.implementations or own.limits.get(option) == 0:
            pytest.skip(f"the {self.name} wing has no {op}")
        return self.call(op, *args, **kwargs)

    def call(self, function: str, *args, **kwargs):
        """Any function of the package that takes a backend."""
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(self.device), (args, kwargs))
        results = getattr(sparse_attn, function)(*args, backend=self.name, **kwargs)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), results)

    def refuses_offsets(self, op: str = "topk_select") -> str | None:
        """Likewise of packed sequences and pages, whose queries have causal offsets of their own."""
        return self.refuses(op, rule=Rule(is_causal=True, causal_offset=torch.zeros(1, dtype=torch.int64)))

    @property
    def topk_select(self):
        return partial(self._run, "topk_select")

    @property
    def gathered_attention(self):
        return partial(self._run, "gathered_attention")

    @property
    def topk_attention(self):
        return partial(self._run, "topk_attention")

    @property
    def indexer_select(self):
        return partial(self._run, "indexer_select")

    @property
    def quantized_select(self):
        return partial(self._run, "quantized_select")

    @property
    def block_attention(self):
        return partial(self._run, "block_attention")

    @property
    def topk_attention_with_residual(self):
        return partial(self._run, "topk_attention_with_residual")

    @property
    def refine_blocks(self):
        return partial(self._run, "refine_blocks")


def devices() -> list[str]:
    """The device types of this machine, the CPU first."""
    found = ["cpu"]
    if triton_wing.interpreted:
        return found  # the interpreter copies the tensors of a GPU to the host: the same again, slower
    found += [name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available()]
    return found


def wings_under_test() -> list[WingUnderTest]:
    """One entry per wing and device; a wing that runs nowhere here has one entry that says why.

    In a session with TRITON_INTERPRET=1 the Triton wing alone, with SPARSE_ATTN_CPU_ISA the CPU wing alone: the others
    are tested without.
    """
    found = []
    alone = "triton" if triton_wing.interpreted else "cpu" if os.environ.get("SPARSE_ATTN_CPU_ISA") else None
    for wing in base.wings():
        if alone not in (None, wing.name):
            continue
        entries, reasons = [], []
        for device in devices():
            dtypes = tuple(d for d in DTYPES if wing.why_not(OPS[0], torch.device(device), d) is None)
            if dtypes:
                entries.append(WingUnderTest(wing.name, device, dtypes))
            else:
                reasons.append(f"on {device}: {wing.why_not(OPS[0], torch.device(device), torch.float32)}")
        if not entries and wing.name in ("cuda", "triton"):
            # No GPU: tests/simt and tests/triton_wing run their kernels without one and compile them for GPUs. Here
            # they would be a thousand skips, among which one that matters could hide.
            continue
        if not entries:
            entries = [
                WingUnderTest(wing.name, "cpu", DTYPES[:3], f"wing {wing.name!r} {'; '.join(reasons)}")
            ]
        found += entries
    return found


def overload(op: str, wing: str):
    """The op of one wing, as torch has it."""
    return getattr(getattr(torch.ops.sparse_attn, op), wing)
