"""How long the first call of each op takes on a GPU, with an empty Triton cache: compiling, loading, one run.

`python -m benchmarks.gpu` runs this in a process of its own with a cache folder of its own. Without a GPU
`PYTHONPATH=.:tests python -m triton_wing.first_call` measures the compiling alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sparse_attn
from benchmarks.gpu.attention import tensors
from benchmarks.gpu.timing import Device
from benchmarks.gpu.tokens import model


def calls(device: Device) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, forward) of each op, bfloat16, at sizes whose run takes no time beside the compiling."""
    heads, length, dim, top_k = (2, 12, 16, 4) if device.dry else (16, 1024, 128, 64)
    for kv_heads, what in ((1, "heads share"), (heads, "heads alone")):
        inputs = [t.requires_grad_() for t in tensors(device, heads, kv_heads, length, dim)]
        indices = torch.arange(top_k, device=device.name, dtype=torch.int32).expand(1, kv_heads, length, -1)
        yield (
            f"gathered_attention, {what}",
            lambda inputs=inputs, indices=indices: sparse_attn.gathered_attention(
                *inputs, indices, backend="triton"
            ),
        )
        for share in ("none", "all") if kv_heads == heads else ():
            yield (
                f"topk_attention, share {share}",
                lambda inputs=inputs, share=share: sparse_attn.topk_attention(
                    *inputs, top_k, is_causal=True, share=share, backend="triton"
                ),
            )
    m = model(device, 1024, torch.bfloat16)
    leaves = tuple(t.requires_grad_() for t in m.leaves)
    maps = (m.token_band, m.token_row)
    hidden = torch.randn(len(m.ids), m.dim, device=device.name).bfloat16().requires_grad_()
    yield (
        "variable_width_embedding",
        lambda: sparse_attn.variable_width_embedding(m.ids, *m.split(leaves), *maps, backend="triton"),
    )
    yield (
        "variable_width_cross_entropy",
        lambda: sparse_attn.variable_width_cross_entropy(
            hidden, m.ids, *m.split(leaves), *maps, backend="triton"
        ),
    )


def first_call(device: Device) -> Iterator[dict]:
    """A kernel that an earlier op has compiled is there already: each op's time is what it adds."""
    for name, forward in calls(device):
        found: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(2):
            out: list[Tensor] = []
            found["forward"].append(device.seconds(lambda out=out, forward=forward: out.append(forward())))
            loss = out[0].float().sum()
            found["backward"].append(device.seconds(lambda loss=loss: loss.backward()))
        for direction, (first, again) in found.items():
            yield {
                "section": "first_call", "case": name, "contender": "ours", "direction": direction,
                "ms": None if device.dry else 1e3 * first, "again_ms": None if device.dry else 1e3 * again,
            }  # fmt: skip
