"""A callback of transformers' Trainer: fewer keys as training goes on, and what share of the visible ones that is.

    from sparse_attn.integrations.trainer import AnnealTopK

    sparse_transformers.configure(model, top_k=64)
    Trainer(model, …, callbacks=[AnnealTopK(start=512, steps=0.5)]).train()

Packed documents (`DataCollatorWithFlattening`) stay apart, as everywhere in this package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sparse_attn import checks
from sparse_attn.integrations.options import NAME, configs_of
from sparse_attn.integrations.selectors import BLOCK


class AnnealTopK(TrainerCallback):
    """Lowers a configured model's budget of keys from `start` to its own `top_k` over the first steps of a training.

    Each step divides the budget by the same number. Beside the loss are logged `sparse_attn/top_k` and
    `sparse_attn/density`, the share of the visible keys that the queries since the last line kept (of a layer that is
    sparse, from lengths alone: no selection is read). It depends on the step alone, so that a resumed training goes on
    with the budget it would have had; when training ends, or fails to begin, the model has its own again.

    Args:
        start: keys per query at step 0, at least the model's own top_k; None logs and changes nothing.
        steps: how long it takes, in steps (an int) or as a share of the training (a float from 0 to 1).

    Raises:
        TypeError, ValueError: a wrong argument; at the beginning of training: a model that has no budget.

    Example:
        >>> from sparse_attn.integrations.trainer import AnnealTopK
        >>> AnnealTopK(start=512, steps=1000).top_k_at(500, end=64, most_steps=1000)
        182
    """

    def __init__(self, start: int | None = None, steps: int | float = 0.5) -> None:
        self.start = None if start is None else checks.integer("start", start, 1)
        if isinstance(steps, float):
            if not 0.0 <= steps <= 1.0:
                raise ValueError(f"steps must be a number of steps, or a share from 0.0 to 1.0, got {steps}")
            self.steps: int | float = steps
        else:
            self.steps = checks.integer("steps", steps, 0)
        self._end: int | None = None
        self._hook: Any = None
        self._kept: Tensor | float = 0.0
        self._visible: Tensor | float = 0.0

    def top_k_at(self, step: int, *, end: int, most_steps: int, multiple_of: int = 1) -> int:
        """The budget of step `step` of `most_steps`, which ends at `end`."""
        if self.start is None or self.start <= end:
            return end
        length = self.steps if isinstance(self.steps, int) else round(self.steps * most_steps)
        if step >= length:
            return end
        budget = math.exp(math.log(self.start) + (math.log(end) - math.log(self.start)) * step / length)
        return max(end, math.ceil(budget / multiple_of - 1e-9) * multiple_of)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        options = (
            getattr(model.config, f"{NAME}_top_k", None),
            getattr(model.config, "_attn_implementation", None),
        )
        if options[0] is None or options[1] != NAME:
            raise ValueError(
                "AnnealTopK needs a model with a budget of keys: call "
                "sparse_attn.integrations.transformers.configure(model, top_k=…) first"
            )
        self._end = options[0]
        if self.start is not None and self.start < options[0]:
            end, self._end = self._end, None
            raise ValueError(f"start must be at least the model's top_k, {end}, got {self.start}")
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if self._end is None or self.start is None:
            return
        whole = getattr(model.config, f"{NAME}_selector", "exact") in ("blocks", "refined_blocks")
        top_k = self.top_k_at(
            state.global_step, end=self._end, most_steps=state.max_steps, multiple_of=BLOCK if whole else 1
        )
        _set(model, top_k)

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **others: Any
    ) -> None:
        if self._end is None or not isinstance(logs, dict) or not float(self._visible):
            return
        said = {
            f"{NAME}/top_k": getattr(model.config, f"{NAME}_top_k"),
            f"{NAME}/density": round(float(self._kept) / float(self._visible), 6),
        }
        self._kept = self._visible = 0.0
        logs.update(said)
        if state.log_history:  # which the Trainer has written before it asks callbacks
            state.log_history[-1].update(said)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Nothing: the step says the budget. A checkpoint's config has that of its step."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._end is not None:
            _set(model, self._end)
            self._end = None

    @torch.no_grad()
    def _before_forward(self, module: torch.nn.Module, arguments: tuple, given: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not module.training:
            return
        seen = _visible(arguments, given)
        if seen is None:
            return
        top_k = getattr(module.config, f"{NAME}_top_k")
        # Of a whole training the sums pass 2^24.
        self._visible = self._visible + seen.sum(dtype=torch.float64)
        self._kept = self._kept + seen.clamp(max=top_k).sum(dtype=torch.float64)


def _set(model: torch.nn.Module, top_k: int) -> None:
    for config in configs_of(model):
        setattr(config, f"{NAME}_top_k", top_k)


def _visible(arguments: tuple, given: dict[str, Any]) -> Tensor | None:
    """How many keys each query of a causal model sees, int [B, T]; None where nothing shows how long its input is."""
    rows = given.get("input_ids", arguments[0] if arguments else None)
    if rows is None:
        rows = given.get("inputs_embeds")
    if not isinstance(rows, Tensor) or rows.dim() < 2:
        return None
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.cumsum(-1) * mask
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions + 1  # from 0 in each packed document
    return torch.arange(1, rows.shape[1] + 1, device=rows.device).expand(rows.shape[:2])
