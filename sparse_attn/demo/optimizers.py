"""How the demo's models learn: Muon for the matrices inside the blocks, AdamW for the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """PyTorch's Muon with its matrix steps in float32; same options, same state, same update but for rounding.

    PyTorch takes them in bfloat16 and lets nobody choose. A CPU without instructions for it then spends four fifths
    of a training step of this small model on them.
    """

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        """parameter, gradient [M, N]"""
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1.0, rows / columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * ratio)


def orthogonalized(
    matrix: Tensor,  # [M, N]
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float = 1e-7,
) -> Tensor:  # [M, N]
    """Newton–Schulz: the singular vectors stay, the singular values come near 1 (as near as Muon wants them).

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # the smaller Gram matrix
    wide = wide.float() / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """For a `sparse_attn.demo.model.GPT`."""
    # Muon reaches words within the few hundred steps that a minute allows; AdamW alone is still at letter pairs.
    inner = [p for p in model.blocks.parameters() if p.dim() == 2]
    outer = [p for p in model.parameters() if all(p is not other for other in inner)]
    return [
        Muon(inner, lr=0.03, weight_decay=0.0),
        torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
