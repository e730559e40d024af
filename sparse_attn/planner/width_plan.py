"""How wide each token's embedding row is: bands of tokens and the width of each band."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.checks import describe, integer
from sparse_attn.files import parse_json, read_text, refusal, stored, write_text
from sparse_attn.planner.choose_widths import choose_widths

FORMAT = "sparse_attn.WidthPlan"
VERSION = 1
LARGEST = 2**31 - 1  # rows are numbered in int32
_ENTRIES = ("embedding_dim", "widths", "token_band")


class WidthPlan:
    """Bands of tokens, and how wide the embedding rows of each band are.

    Token t lies in band `token_band[t]`, and its row is `tables[band][token_row[t]]`, `widths[band]` numbers wide. A
    projection `[embedding_dim, widths[band]]` brings it to the model's width; a band as wide as the model has none.
    The order of the ids does not matter: any token may lie in any band.

    Args:
        embedding_dim: the model's width D, from 1 to 2³¹ − 1.
        widths: one width per band, each from 1 to D, in any order (`plan_widths` makes them descend).
        token_band: the band of each token, integers in [0, len(widths)), shape [V] with V ≥ 1; a tensor, array or
            sequence. A band may be empty.

    Attributes:
        embedding_dim: D.
        widths: tuple of B ints.
        token_band: int32 CPU tensor [V].
        token_row: int32 CPU tensor [V], the rank of each token within its band, in id order.
        band_sizes: tuple of B ints, how many tokens each band holds.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or out of range; the message says which.

    A plan is not changed after it is made. It compares by value, and goes into a file by `to_json` or, inside a
    module's state dict, by `state_dict`.

    Example::

        >>> plan = WidthPlan.from_cutoffs(50257, 512, cutoffs=[2000, 10000], widths=[512, 128, 32])
        >>> plan.num_parameters()
        3418144
        >>> plan.band_sizes
        (2000, 8000, 40257)
    """

    def __init__(self, embedding_dim: int, widths: Sequence[int], token_band: Tensor | Sequence[int]) -> None:
        self.embedding_dim: int = int(integer("embedding_dim", embedding_dim, 1, LARGEST))
        self.widths: tuple[int, ...] = _widths(widths, self.embedding_dim)
        self.token_band: Tensor = _token_band(token_band, len(self.widths))
        sizes = torch.bincount(self.token_band, minlength=len(self.widths))
        self.band_sizes: tuple[int, ...] = tuple(sizes.tolist())

    @classmethod
    def from_cutoffs(
        cls, num_embeddings: int, embedding_dim: int, cutoffs: Sequence[int], widths: Sequence[int]
    ) -> WidthPlan:
        """A plan for ids in order of frequency: ids below `cutoffs[0]` form band 0, and so on.

        Args:
            num_embeddings: V.
            embedding_dim: D.
            cutoffs: ascending ids strictly between 0 and V, as `nn.AdaptiveLogSoftmaxWithLoss` takes them.
            widths: one width per band, `len(cutoffs) + 1` of them.
        """
        num_embeddings = int(integer("num_embeddings", num_embeddings, 1, LARGEST))
        bounds = [int(integer("every cutoff", cutoff)) for cutoff in _sequence("cutoffs", cutoffs)]
        edges = [0, *bounds, num_embeddings]
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(
                f"cutoffs must ascend strictly between 0 and num_embeddings = {num_embeddings}, got {bounds}"
            )
        if len(_sequence("widths", widths)) != len(bounds) + 1:
            raise ValueError(
                f"widths must have one entry per band, len(cutoffs) + 1 = {len(bounds) + 1}, got {len(widths)}"
            )
        sizes = torch.tensor([high - low for low, high in itertools.pairwise(edges)], device="cpu")
        bands = torch.arange(len(sizes), dtype=torch.int32, device="cpu")
        return cls(embedding_dim, widths, torch.repeat_interleave(bands, sizes))

    @classmethod
    def from_counts(
        cls,
        counts: Tensor | Sequence[float],
        embedding_dim: int,
        *,
        budget: int | None = None,
        ratio: float | None = None,
        num_bands: int = 4,
        **options: Any,
    ) -> WidthPlan:
        """`sparse_attn.plan_widths` under another name: bands and widths from how often each token occurs, [V]."""
        options |= {"budget": budget, "ratio": ratio, "num_bands": num_bands}
        return cls(embedding_dim, *choose_widths(counts, embedding_dim, **options))

    @property
    def num_embeddings(self) -> int:
        """V, the size of the vocabulary."""
        return len(self.token_band)

    @property
    def num_bands(self) -> int:
        """B."""
        return len(self.widths)

    @cached_property
    def token_row(self) -> Tensor:
        """int32 CPU tensor [V]: the row of each token in its band's table, the band's tokens in id order."""
        order = torch.sort(self.token_band, stable=True).indices
        sizes = torch.tensor(self.band_sizes, device="cpu")
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        rows = torch.empty_like(self.token_band)
        rows[order] = (torch.arange(len(order), device="cpu") - starts).to(torch.int32)
        return rows

    def tokens_of(self, band: int) -> Tensor:
        """The ids of a band, ascending, int64 [band_sizes[band]]: row r of its table is token `tokens_of(band)[r]`."""
        integer("band", band, 0, self.num_bands - 1)
        return (self.token_band == band).nonzero().squeeze(1)

    def band_parameters(self) -> tuple[int, ...]:
        """Per band: the numbers in its table and, where it is narrower than the model, in its projection."""
        return tuple(
            size * width + (self.embedding_dim * width if width != self.embedding_dim else 0)
            for size, width in zip(self.band_sizes, self.widths, strict=True)
        )

    def num_parameters(self) -> int:
        """How many numbers the tables and the projections hold together."""
        return sum(self.band_parameters())

    @property
    def compression(self) -> float:
        """How many times smaller than the full table [V, embedding_dim] the plan is."""
        return self.num_embeddings * self.embedding_dim / self.num_parameters()

    def state_dict(self) -> dict[str, object]:
        """Plain data, which `torch.save` and `torch.load(weights_only=True)` take; `from_state` reads it."""
        return {
            "embedding_dim": self.embedding_dim,
            "widths": list(self.widths),
            "token_band": self.token_band.clone(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> WidthPlan:
        """The plan that `state_dict()` gave."""
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state must be a dict with the entries {', '.join(_ENTRIES)}, got {describe(state)}"
            )
        missing = [name for name in _ENTRIES if name not in state]
        if missing:
            raise ValueError(
                f"state must have the entries embedding_dim, widths and token_band, lacks {', '.join(missing)}"
            )
        band = state["token_band"]
        if isinstance(band, Tensor):
            stored("token_band", band)
        return cls(state["embedding_dim"], state["widths"], band)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ENTRIES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a pickle holds is checked as what a caller gives; `torch.load(weights_only=True)` takes plans."""
        self.__dict__.update(WidthPlan.from_state(state).__dict__)

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as a JSON text, also written to `path` when one is given."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "embedding_dim": self.embedding_dim,
            "num_embeddings": self.num_embeddings,
            "widths": self.widths,
            "band_sizes": self.band_sizes,
            "num_parameters": self.num_parameters(),
            "token_band": self.token_band.tolist(),
        }
        # One entry a line, and the long one on one line: readable, and half the size of an indented list.
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> WidthPlan:
        """The plan in a JSON text or, given a path, in a file.

        Raises:
            ValueError: it is no plan, or one that contradicts itself; of a file the message begins with the path.
            OSError: the file cannot be read.
        """
        if not isinstance(source, Path) and source.lstrip().startswith("{"):
            return cls._from_text(source)
        text = read_text(source, "plan")
        try:
            return cls._from_text(text)
        except (TypeError, ValueError) as error:
            raise refusal(source, "plan", error) from None

    @classmethod
    def _from_text(cls, text: str) -> WidthPlan:
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"the plan is not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f'a plan is a JSON object with the entry "format": {FORMAT!r}, got {describe(data)}'
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"this version of sparse_attn reads plans of version {VERSION}, got {data.get('version')!r}"
            )
        plan = cls.from_state(data)
        for name in ("num_embeddings", "band_sizes", "num_parameters"):
            right = getattr(plan, name)
            right = right() if callable(right) else list(right) if isinstance(right, tuple) else right
            if data.get(name, right) != right:
                raise ValueError(
                    f"the plan's {name} must be {right}, as its token_band has it, got {describe(data[name])}"
                )
        return plan

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WidthPlan):
            return NotImplemented
        return (
            self.embedding_dim == other.embedding_dim
            and self.widths == other.widths
            and torch.equal(self.token_band, other.token_band)
        )

    def __hash__(self) -> int:
        return hash((self.embedding_dim, self.widths, self.band_sizes))

    def __repr__(self) -> str:
        head = (
            f"WidthPlan(num_embeddings={self.num_embeddings:,}, embedding_dim={self.embedding_dim}, "
            f"parameters={self.num_parameters():,}, {self.compression:.2f}x smaller than the full table)"
        )
        rows = [("band", "tokens", "width", "parameters")]
        for band, (size, width, numbers) in enumerate(
            zip(self.band_sizes, self.widths, self.band_parameters(), strict=True)
        ):
            rows.append((str(band), f"{size:,}", str(width), f"{numbers:,}"))
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.rjust(w) for c, w in zip(row, columns, strict=True)) for row in rows)
        return "\n  ".join([head, *lines])


def _sequence(name: str, value: object) -> list:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence of ints, got {describe(value)}")
    return value.tolist() if isinstance(value, Tensor) else list(value)


def _widths(widths: Sequence[int], embedding_dim: int) -> tuple[int, ...]:
    checked = tuple(int(integer("every width", width, 1)) for width in _sequence("widths", widths))
    if not checked:
        raise ValueError("widths must have one entry per band, at least one, got none")
    if max(checked) > embedding_dim:
        raise ValueError(
            f"every width must be at most embedding_dim = {embedding_dim}, got widths={list(checked)}"
        )
    return checked


def _token_band(token_band: Tensor | Sequence[int], num_bands: int) -> Tensor:
    """int32 [V] on the CPU, a copy that nobody else holds."""
    try:
        band = torch.as_tensor(token_band, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"token_band must be a tensor of integers of shape [V], got {describe(token_band)}"
        ) from None
    if band.is_floating_point() or band.is_complex() or band.dtype == torch.bool:
        raise TypeError(f"token_band must hold integers, got {describe(band)}")
    if band.dim() != 1 or len(band) == 0:
        raise ValueError(f"token_band must have shape [V] with V at least 1, got {describe(band)}")
    band = band.detach().to("cpu", torch.int64)
    low, high = (int(x) for x in band.aminmax())
    if low < 0 or high >= num_bands:
        token = int(((band < 0) | (band >= num_bands)).nonzero()[0])
        raise ValueError(
            f"token_band must lie in [0, {num_bands}), the bands that widths names, "
            f"got {int(band[token])} for token {token}"
        )
    return band.to(torch.int32, copy=True).contiguous()


# `torch.load(weights_only=True)` takes a plan, which checks itself.
torch.serialization.add_safe_globals([WidthPlan])
