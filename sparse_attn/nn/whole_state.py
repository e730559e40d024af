"""Modules whose state is loaded whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks


class WholeState(torch.nn.Module):
    """A module of which `load_state_dict` loads nothing where a tensor of the state does not fit.

    torch.nn.Module loads what fits and then raises. Entries that are missing or not known are torch's to judge, which
    it does after all modules have loaded.
    """

    def _why_not_load(self, state: dict[str, Any], prefix: str) -> str | None:
        """None where the tensors under `prefix` fit this module, else what does not."""
        for name, tensor in self._own_tensors().items():
            given = state.get(f"{prefix}{name}", tensor)
            if not isinstance(given, Tensor):
                return f"{prefix}{name} must be a tensor, got {checks.describe(given)}"
            if given.shape != tensor.shape:
                return (
                    f"size mismatch for {prefix}{name}: the module has shape {list(tensor.shape)}, "
                    f"the state {list(given.shape)}"
                )
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        refusal = self._why_not_load(state_dict, prefix)
        if refusal is None:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            return
        arguments[-1].append(refusal)
        # The submodules have their turn after this one: they find what they hold.
        state_dict.update((f"{prefix}{name}", tensor) for name, tensor in self._own_tensors().items())

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}
