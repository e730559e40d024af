"""`tail_attention`, forward: attention to all visible keys, where those that were not chosen have their mean value.

One pass over tiles of keys (lib/tile_attention.py): the softmax is over all of them, the chosen ones are weighed as in
any attention, and the values of the others are summed by a product with zeros and ones, exact but for the order
of its float32 sums. Which keys were chosen is a bit each, set by a kernel for a chunk of queries at a time.

A sum of all values less that of the chosen ones would save the second product and cost the first all its digits where
most keys are chosen; a first pass for the normaliser alone would save the accumulator and cost each exponential twice.

Floor: three products where dense attention has two. T = 16k, 16 heads, D = Dv = 128, causal: 1.65 TFLOP, 2.7 ms at
600 TFLOP/s, whatever K; the bits are 34 MB a head, from the second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.rule import PackedRule

from .lib.tile_attention import launch_attend
from .lib.tile_chunks import arguments, words_of
from .lib.tile_rows import Shape


def tail_attention(
    query: Tensor,  # [B, Hq, Tq, D]
    key: Tensor,  # [B, Hkv, Tk, D]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    indices: Tensor,  # int32 [B, G, Tq, K]
    rule: PackedRule,
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq], outside likewise
    shape = Shape.of(query, key, value, indices.shape[1], key.shape[1])
    out = query.new_empty((*query.shape[:3], shape.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    outside = torch.empty_like(lse)
    if out.numel() == 0:
        return out, lse, outside
    if shape.key_rows == 0:
        lse.fill_(-torch.inf) if rule.sink_logits is None else lse.copy_(rule.sink_logits.unsqueeze(-1))
        return out.zero_(), lse, outside.zero_()
    for first, chunk, words in words_of(indices, shape, 32, shape.key_rows):
        launch_attend(
            query, value, shape, 1, chunk * shape.shared, sink_logits=rule.sink_logits, out=out, lse=lse,
            outside=outside, slots=0, **arguments(key, words, shape, rule, shape.key_rows, 1, first, chunk),
        )  # fmt: skip
    return out, lse, outside
