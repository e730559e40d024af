"""`block_tail`, backward: as in `block_attention`, of all means (lib/query_gradients.py, key_gradients.py).

There are few means, so the queries are cut into pieces that fill a device; each has a dK and dV of its own, and they
are added in order (lib/tile_chunks.py).
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.tile_chunks import gradients


def block_tail_backward(
    grad_out: Tensor,  # [B, Hq, Tq, Dv]
    grad_lse: Tensor | None,  # float32 [B, Hq, Tq]
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, M, D]
    value: Tensor,  # [B, Hkv, M, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    out: Tensor,  # [B, Hq, Tq, Dv]
    lse: Tensor,  # float32 [B, Hq, Tq]
    key_length: int,
    block_size: int,
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # gradients of query, key, value
    return gradients(
        "block_tail_backward", grad_out, grad_lse, query, key, value, indices, out, lse, None, key_length, block_size,
        rule,
    )  # fmt: skip
