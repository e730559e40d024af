"""`tail_attention`, backward: as in `block_attention`, of all keys (lib/query_gradients.py, lib/key_gradients.py).

A key that was not chosen has a probability, so it has a gradient, too: with m the mean of what row i left out,
dS = P ∘ (dO·v − δ) of the chosen keys and P ∘ (dO·m − δ) of the others, and dV of each of the others gets an equal part
of its rows' P outside of the selection.

Floor: eight products where a dense backward has five: both kernels make scores and dO·v, and dO·m takes dO·v once more.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.tile_chunks import gradients


def tail_attention_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    outside: Tensor,  # float32 [B, Hq, Tq]
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    return gradients(
        "tail_attention_backward", grad_out, grad_lse, query, key, value, indices, out, lse, outside, key.shape[2], 1,
        rule,
    )  # fmt: skip
