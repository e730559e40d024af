"""The wing of csrc/cpu: kernels compiled into `sparse_attn._C`, for the instruction set that the CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_attn.rule import EVERY_PART
from sparse_attn.wings import extension, tile_costs
from sparse_attn.wings.base import Wing, register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if extension.load_error is not None:
        return extension.load_error
    if device.type != "cpu":
        return f"it takes cpu tensors, got {device.type}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return None


def _way(op: str, sizes: dict[str, int]) -> str | None:
    """As csrc/cpu/topk_decode.h, masked_attention.h and ops/key_index.py have it."""
    if op not in ("topk_select", "topk_attention"):
        return None
    if "key_index" in sizes:
        return "few queries; what the key index cannot rule out is scored"
    if sizes["queries"] <= 16 and "rounded_scores" not in sizes and "blocks" not in sizes:
        return "few queries; each key is read once and none is packed"
    packed = "keys are packed, then scored in tiles"
    if op == "topk_attention" and sizes["queries"] > 16 and "keys" in sizes:
        # Of a query that sees all keys; those that see few of them gather.
        tiles = extension.module.tiles_pay(
            sizes["keys"], sizes["top_k"], sizes["head_dim"], sizes["value_dim"]
        )
        return f"{packed}, {'attended to by masked tiles' if tiles else 'and the chosen ones gathered'}"
    return packed


def said_of_bounds(counts: dict[str, int]) -> str:
    """What selection by bounds did, in words; `counts` as :func:`selection_by_bounds` has them."""
    blocks = counts["blocks"] + counts["given_up"]
    if blocks == 0:
        return "every score exact"
    kept, scored = (counts[name] / max(1, counts["budget"]) for name in ("kept", "scored"))
    return (
        f"by bounds: {kept:.2f}·K keys left, {scored:.2f}·K scored again, "
        f"{counts['given_up']} of {blocks} blocks given up"
    )


def _counts_since(before: dict[str, int]) -> dict[str, int]:
    return {name: n - before[name] for name, n in extension.module.bounds_counts().items()}


@contextmanager
def _watch() -> Iterator[list[str]]:
    said: list[str] = []
    before = extension.module.bounds_counts()
    yield said
    said.append(said_of_bounds(_counts_since(before)))


CPU_WING = Wing(
    "cpu", "CPU", extension.ops_of("cpu", "CPU"), _why_not, rule=EVERY_PART, way=_way, watch=_watch
)
register(CPU_WING)
if extension.module is not None:
    tile_costs.load(extension.module)


@contextmanager
def selection_by_bounds(use: bool | None, bits: int = 0) -> Iterator[dict[str, int]]:
    """Exact selection by bounds of rounded scores in this process, which has the same bits.

    True: wherever it can be done; False: never; None: where it is faster, as without this. Rows are rounded to 16
    `bits`, to 8 (on CPUs with VNNI, and without AVX2; 16 elsewhere), to 9, which is bfloat16 (on CPUs with AMX; 16
    elsewhere), or (0) to what is faster.

    Yields a dict that the end of the block fills with what the bounds did meanwhile: blocks of queries selected so, and
    blocks given_up for the full product; of the former the rows, their budget of keys, how many keys were kept as
    candidates and how many of these had to be scored exactly.
    """
    if extension.module is None:
        raise RuntimeError(extension.load_error)
    if bits not in (0, 8, 9, 16):
        raise ValueError(f"bits must be 8, 9, 16, or 0 for what is faster, got {bits}")
    before = extension.module.bounds_counts()
    counts: dict[str, int] = {}
    extension.module.use_bounds(use, bits)
    try:
        yield counts
    finally:
        extension.module.use_bounds(None)
        counts.update(_counts_since(before))


@contextmanager
def attention_by_tiles(use: bool | None) -> Iterator[None]:
    """Attention by dense tiles of scores, masked to the chosen keys, in this process; the selection is the same.

    True: wherever it can be done; False: never, all rows gather; None: where it is faster, as without this.
    """
    if extension.module is None:
        raise RuntimeError(extension.load_error)
    extension.module.use_tiles(use)
    try:
        yield
    finally:
        extension.module.use_tiles(None)
