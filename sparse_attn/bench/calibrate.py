"""What dense tiles and gathering cost on this machine: a few calls of both ways, and the costs that explain them.

The costs are those of csrc/cpu/tile_costs.h, in nanoseconds of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from sparse_attn import gathered_attention, topk_select
from sparse_attn.wings.cpu import attention_by_tiles, selection_by_bounds

LENGTH, KEPT, HEADS, WIDTHS = 2048, 512, 2, (32, 128)
ROWS = LENGTH * HEADS


def measure(step: Callable[[str], None] = lambda what: None) -> dict[str, float]:
    """Costs by name; `step` is told what comes next, `STEPS` times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = dict(_measured(step))
    finally:
        torch.set_num_threads(threads)
    costs = {}
    for suffix in ("", "_backward"):
        components = [2.0 * width for width in WIDTHS]
        gather = [found[f"gather{suffix}", width] / (ROWS * KEPT) for width in WIDTHS]
        tiles = [found[f"tiles{suffix}", width] / (ROWS * LENGTH) for width in WIDTHS]
        slope = max(0.0, (tiles[1] - tiles[0]) / (components[1] - components[0]))
        costs[f"tile{suffix}"] = slope
        costs[f"tile_key{suffix}"] = max(0.0, tiles[0] - slope * components[0])
        costs[f"gather{suffix}"] = sum(g / c for g, c in zip(gather, components, strict=True)) / len(gather)
    passing = KEPT * (1 + torch.tensor(LENGTH / KEPT).log().item())
    costs["candidate"] = max(0.0, (found["select", KEPT] - found["select", 1]) / (ROWS * passing))
    return costs


STEPS = 2 * 2 * len(WIDTHS) + 2


def _measured(step: Callable[[str], None]) -> Iterator[tuple[tuple[str, int], float]]:
    """Nanoseconds of calls."""
    generator = torch.Generator().manual_seed(0)
    for width in WIDTHS:
        tensors = [torch.randn(1, HEADS, LENGTH, width, generator=generator) for _ in range(3)]
        for tensor in tensors:
            tensor.requires_grad_()
        with torch.no_grad():
            indices = topk_select(tensors[0], tensors[1], KEPT)
        for way, tiles in (("gather", False), ("tiles", True)):
            with attention_by_tiles(tiles):
                step(f"{way}, width {width}")
                out = gathered_attention(*tensors, indices)
                with torch.no_grad():
                    yield (way, width), _fastest(lambda t=tensors, i=indices: gathered_attention(*t, i))
                step(f"{way}, width {width}, backward")
                gradient = torch.ones_like(out)
                yield (
                    (f"{way}_backward", width),
                    _fastest(
                        lambda o=out, t=tensors, g=gradient: torch.autograd.grad(o, t, g, retain_graph=True)
                    ),
                )
    query, key = (torch.randn(1, HEADS, LENGTH, WIDTHS[0], generator=generator) for _ in range(2))
    for top_k in (1, KEPT):
        step(f"selection, K={top_k}")
        with selection_by_bounds(False):
            yield ("select", top_k), _fastest(lambda k=top_k: topk_select(query, key, k))


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e9 * min(times)
