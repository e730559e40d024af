"""The variable-width embedding's benchmark: token ids, contenders, and the check before any of them is timed.

Real ids are the GPT-2 byte-pair encoding of the State of the Union addresses that ship with the package; the
encoding's `encoder.json` and `vocab.bpe` are read from the folder that SPARSE_ATTN_GPT2_BPE names, and nothing is
fetched. Ids by Zipf's law stand beside them, or in their place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks.correctness import WrongResult
from sparse_attn.planner import WidthPlan

GPT2_BPE = "SPARSE_ATTN_GPT2_BPE"
VOCABULARY, DIM = 50257, 512
BAND_SIZES, WIDTHS = (2000, 8000, 40257), (512, 128, 32)
COUNT = 16384
KINDS = ("real", "zipf")
SETTING = f"V={VOCABULARY}, D={DIM}, bands {BAND_SIZES} of widths {WIDTHS}, {COUNT} ids, float32"

LABELS = {
    "ours": "sparse_attn",
    "ours_sparse": "sparse_attn, sparse gradients",
    "embedding": "nn.Embedding (dense table)",
    "embedding_sparse": "nn.Embedding, sparse gradients",
    "eager": "eager adaptive input",
    "compiled": "torch.compile of all bands",
}
# contender → the least acceptable time over ours, forward and forward + backward
TARGETS = {
    "forward": {"eager": 4.0, "embedding": 1 / 1.3},
    "forward + backward": {"eager": 3.0, "compiled": 1.0},
}


@dataclass
class Inputs:
    """One embedding and some ids; `ranks` are the ids in order of frequency, which the rivals' bands need."""

    kind: str
    ids: Tensor  # [COUNT]
    ranks: Tensor  # [COUNT]
    plan: WidthPlan
    order: Tensor  # [V]: the token of each rank
    tables: tuple[Tensor, ...]
    projections: tuple[Tensor, ...]  # of the bands but the first, which is full

    def dense(self) -> Tensor:
        """The table [V, D] by token id."""
        first, *narrow = self.tables
        by_rank = torch.cat([first, *(t @ p.t() for t, p in zip(narrow, self.projections, strict=True))])
        return torch.empty_like(by_rank).index_copy(0, self.order, by_rank)


def why_not(kind: str) -> str | None:
    """None if there are such ids, else the reason in one clause."""
    if kind == "real" and not os.environ.get(GPT2_BPE):
        return f"{GPT2_BPE} is not set (a folder with GPT-2's encoder.json and vocab.bpe)"
    return None


@lru_cache(maxsize=2)
def make(kind: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    if kind == "real":
        text = torch.tensor(gpt2_tokens())
        start = (len(text) - COUNT) // 2
        ids = text[start : start + COUNT]
        counts = torch.bincount(text, minlength=VOCABULARY)
    else:
        weights = 1 / (torch.arange(VOCABULARY) + 2.7)
        names = torch.randperm(VOCABULARY, generator=generator)
        ids = names[torch.multinomial(weights, COUNT, replacement=True, generator=generator)]
        counts = torch.empty(VOCABULARY).index_copy(0, names, weights)
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(VOCABULARY))
    band = torch.repeat_interleave(torch.arange(3), torch.tensor(BAND_SIZES))[rank]
    plan = WidthPlan(DIM, WIDTHS, band)
    tables = tuple(torch.randn(n, w, generator=generator) for n, w in zip(BAND_SIZES, WIDTHS, strict=True))
    projections = tuple(torch.randn(DIM, w, generator=generator) / w**0.5 for w in WIDTHS[1:])
    # Rows by rank within each band for the rivals, in id order for ours: only the names of the rows differ.
    return Inputs(kind, ids.contiguous(), rank[ids], plan, order, tables, projections)


def prepare(name: str, inputs: Inputs) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(forward of the leaves, the leaves): tables and projections, or the dense table."""
    leaves = (*inputs.tables, *inputs.projections)
    if name.startswith("embedding"):
        sparse = name.endswith("sparse")
        return lambda table: F.embedding(inputs.ids, table, sparse=sparse), (inputs.dense(),)
    if name == "eager":
        return lambda *leaves: _eager(inputs.ranks, leaves), leaves
    if name == "compiled":
        compiled = torch.compile(_all_bands, fullgraph=True, dynamic=False)
        return lambda *leaves: compiled(inputs.ranks, leaves), leaves
    band, ids = inputs.plan.token_band, inputs.ids
    starts = torch.tensor([0, BAND_SIZES[0], BAND_SIZES[0] + BAND_SIZES[1]])
    rank = torch.empty(VOCABULARY, dtype=torch.int64).index_copy(0, inputs.order, torch.arange(VOCABULARY))
    row = (rank - starts[band.long()]).to(torch.int32)
    sparse = name.endswith("sparse")

    def ours(*leaves: Tensor) -> Tensor:
        return sparse_attn.variable_width_embedding(
            ids, leaves[:3], (None, *leaves[3:]), band, row, sparse=sparse
        )

    return ours, leaves


def _eager(ids: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
    """Adaptive input as fairseq and others write it: mask, lookup, projection and assignment per band."""
    out = torch.zeros(len(ids), DIM)
    low = 0
    for b, size in enumerate(BAND_SIZES):
        inside = (ids >= low) & (ids < low + size)
        if inside.any():
            rows = F.embedding(ids[inside] - low, leaves[b])
            out[inside] = rows if b == 0 else F.linear(rows, leaves[2 + b])
        low += size
    return out


def _all_bands(ids: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
    """The same without sizes that depend on the ids, so that it compiles to one graph."""
    out, low = torch.zeros(len(ids), DIM), 0
    for b, size in enumerate(BAND_SIZES):
        inside = (ids >= low) & (ids < low + size)
        rows = F.embedding((ids - low).clamp(0, size - 1), leaves[b])
        rows = rows if b == 0 else F.linear(rows, leaves[2 + b])
        out = torch.where(inside.unsqueeze(1), rows, out)
        low += size
    return out


def check(name: str, inputs: Inputs) -> None:
    """Raises WrongResult unless output and gradients equal those of the dense table in float64."""
    forward, leaves = prepare(name, inputs)
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    wide = Inputs(
        inputs.kind,
        inputs.ids,
        inputs.ranks,
        inputs.plan,
        inputs.order,
        tuple(t.double().requires_grad_() for t in inputs.tables),
        tuple(p.double().requires_grad_() for p in inputs.projections),
    )
    table = wide.dense()
    want = table[inputs.ids]
    wide_leaves = (table,) if name.startswith("embedding") else (*wide.tables, *wide.projections)
    grad_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    out = forward(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_out)
    wanted = torch.autograd.grad(want, wide_leaves, grad_out.double())
    for what, got, true in zip(
        ("output", *["gradient"] * len(grads)), (out, *grads), (want, *wanted), strict=True
    ):
        got = got.to_dense() if got.is_sparse else got
        error = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not error <= 1e-5:  # also catches NaN
            raise WrongResult(f"{name}: {what} on {inputs.kind} ids: relative error {error:.2e}")


# ---- GPT-2's byte-pair encoding ----------------------------------------------------------------------------

# Letters, digits, the rest and white space, as the original says them with \p{L} and \p{N}.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def _byte_names() -> dict[int, str]:
    """A printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def gpt2_tokens() -> list[int]:
    """The ids of the package's text."""
    folder = Path(os.environ[GPT2_BPE])
    number = json.loads((folder / "encoder.json").read_text("utf-8"))
    merges = (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]
    order = {tuple(line.split()): i for i, line in enumerate(merges) if line}
    names = _byte_names()

    @cache
    def encode(piece: str) -> tuple[int, ...]:
        parts = [names[b] for b in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: order.get(pair, len(order)))
            if best not in order:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 2 if both else 1
            parts = merged
        return tuple(number[part] for part in parts)

    text = (files("sparse_attn") / "data" / "state_of_the_union.txt").read_text("utf-8")
    return [token for piece in _PIECES.findall(text) for token in encode(piece)]
