"""Layers with weights of their own for each attention head, all heads in one batched product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.ops.arguments import autocast


class PerHeadLinear(torch.nn.Module):
    """`nn.Linear` once per head: [B, H, T, in] → [B, H, T, out]; weight [H, in, out], bias [H, out]."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (num_heads, in_features, out_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(num_heads, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Whatever a linear layer is initialised to by nn.Linear: uniform within ±1/√in."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor, out_features: int | None = None) -> Tensor:
        """x [B, H, T, in] → [B, H, T, out]; `out_features` computes only the first so many outputs."""
        x, weight, bias = autocast(x, self.weight, self.bias)
        if x.dtype != weight.dtype:
            raise TypeError(
                f"the input must have the parameters' dtype {weight.dtype}, got {checks.describe(x)}"
            )
        weight, bias = weight[..., :out_features], bias[..., :out_features]
        batch, heads, length = x.shape[:3]
        # One product per head over all sequences: matmul would copy the weights for each sequence of the batch.
        rows = x.transpose(0, 1).reshape(heads, batch * length, x.shape[3])
        out = torch.baddbmm(bias.unsqueeze(1), rows, weight)  # [H, B·T, out]
        return out.unflatten(1, (batch, length)).transpose(0, 1)

    def extra_repr(self) -> str:
        heads, in_features, out_features = self.weight.shape
        return f"num_heads={heads}, in_features={in_features}, out_features={out_features}"


def check_input(name: str, value: object, num_heads: int, head_dim: int) -> None:
    """value [B, num_heads, T, head_dim]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor of shape [B, {num_heads}, T, {head_dim}], got {checks.describe(value)}"
        )
    if value.dim() != 4 or value.shape[1] != num_heads or value.shape[3] != head_dim:
        raise ValueError(
            f"{name} must have shape [B, {num_heads}, T, {head_dim}], got {checks.describe(value)}"
        )
