"""Which positions of a sequence lie on which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.rule import Rule


class Span(NamedTuple):
    """Positions start … stop − 1 of the whole sequence, which lie at `at` … of the rank's own part."""

    start: int
    stop: int
    at: int

    @property
    def local(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


def _whole(number: Any) -> int:
    return int(checks.integer("each number of ranges", number))


def _sizes(length: int, ranks: int) -> tuple[int, int]:
    return int(checks.integer("length", length, 0)), int(checks.integer("ranks", ranks, 1))


@dataclass(frozen=True)
class Layout:
    """Which positions of a sequence lie on which rank, in ascending order on each.

    Args:
        ranges: for each rank its ranges (start, stop), ascending; together they cover 0 … T − 1, each position once.
            A rank may have none.

    Raises:
        ValueError: positions are missing, or stand twice.

    Example:
        >>> from sparse_attn.distributed import Layout
        >>> Layout.zigzag(8, 2).ranges
        (((0, 2), (6, 8)), ((2, 4), (4, 6)))
        >>> Layout.even(7, 3).lengths
        [3, 3, 1]
    """

    ranges: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        try:
            ranges = tuple(tuple((_whole(a), _whole(b)) for a, b in own) for own in self.ranges)
        except (TypeError, ValueError):
            raise TypeError(
                "ranges must be a tuple that has for each rank a tuple of (start, stop), whole numbers, "
                f"got {checks.describe(self.ranges)}"
            ) from None
        object.__setattr__(self, "ranges", ranges)
        pieces = sorted(piece for own in self.ranges for piece in own if piece[0] != piece[1])
        end = 0
        for start, stop in pieces:
            if start != end or stop < start:
                raise ValueError(
                    f"ranges must cover the sequence from 0 on, each position once; position {min(start, end)} is "
                    f"{'missing' if start > end else 'there twice'}"
                )
            end = stop
        for own in self.ranges:
            if list(own) != sorted(own):
                raise ValueError(f"the ranges of a rank must ascend, got {own}")

    @classmethod
    def contiguous(cls, lengths: Sequence[int]) -> Layout:
        """One range per rank, of these lengths (0 too), in the order of the ranks."""
        if isinstance(lengths, str) or not hasattr(lengths, "__iter__"):
            raise TypeError(f"lengths must be a sequence of whole numbers, got {checks.describe(lengths)}")
        lengths = [int(checks.integer("each of lengths", n, 0)) for n in lengths]
        ends = [sum(lengths[: r + 1]) for r in range(len(lengths))]
        return cls(tuple(((end - n, end),) for n, end in zip(lengths, ends, strict=True)))

    @classmethod
    def even(cls, length: int, ranks: int) -> Layout:
        """As `Tensor.chunk` and DTensor cut: ⌈T / ranks⌉ positions each, the last ranks fewer or none."""
        length, ranks = _sizes(length, ranks)
        size = -(-length // ranks)
        return cls.contiguous([max(0, min(size, length - r * size)) for r in range(ranks)])

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Layout:
        """Load-balanced for causal attention: of 2·ranks chunks rank r has chunks r and 2·ranks − 1 − r."""
        length, ranks = _sizes(length, ranks)
        size = -(-length // (2 * ranks))
        chunk = [(min(c * size, length), min((c + 1) * size, length)) for c in range(2 * ranks)]
        return cls(tuple((chunk[r], chunk[-1 - r]) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        return len(self.ranges)

    @property
    def length(self) -> int:
        """T, of the whole sequence."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Positions on each rank."""
        return [sum(stop - start for start, stop in own) for own in self.ranges]

    def spans(self, rank: int) -> list[Span]:
        """The rank's ranges that hold something, each with its place in the rank's own part."""
        spans, at = [], 0
        for start, stop in self.ranges[rank]:
            if stop > start:
                spans.append(Span(start, stop, at))
                at += stop - start
        return spans

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """int64 [T_r]: the rank's positions, for a rotary or learned position embedding."""
        own = [torch.arange(start, stop, device=device) for start, stop in self._of(rank)]
        return torch.cat(own) if own else torch.empty(0, dtype=torch.int64, device=device)

    def _of(self, rank: int) -> tuple[tuple[int, int], ...]:
        return self.ranges[checks.integer("rank", rank, 0, self.ranks - 1)]

    def local(self, whole: Tensor, rank: int, dim: int) -> Tensor:
        """The rank's part of a tensor that holds the whole sequence along `dim`."""
        if (
            not isinstance(whole, Tensor)
            or not -whole.dim() <= dim < whole.dim()
            or whole.shape[dim] != self.length
        ):
            raise ValueError(
                f"whole must be a tensor that has the layout's {self.length} positions along dim={dim}, "
                f"got {checks.describe(whole)}"
            )
        parts = [whole.narrow(dim, start, stop - start) for start, stop in self._of(rank)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0)

    def whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The sequence in order along `dim`, of the parts of all ranks."""
        spans = [(span, rank) for rank in range(self.ranks) for span in self.spans(rank)]
        if len(parts) != self.ranks or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(
                f"parts must hold the part of each of the layout's {self.ranks} ranks, got {checks.describe(parts)}"
            )
        pieces = [parts[rank].narrow(dim, s.at, s.stop - s.start) for s, rank in sorted(spans)]
        return torch.cat(pieces, dim) if pieces else parts[0]


def owners(layout: Layout, positions: Tensor) -> Tensor:
    """int64: the rank that has each position."""
    spans = sorted((s.start, s.stop, r) for r in range(layout.ranks) for s in layout.spans(r))
    device = positions.device
    if not spans:
        return torch.zeros_like(positions)
    ends = torch.tensor([stop for _, stop, _ in spans], device=device)
    return torch.tensor([r for *_, r in spans], device=device)[torch.bucketize(positions, ends, right=True)]


def local_places(layout: Layout, rank: int, positions: Tensor) -> Tensor:
    """int64: where positions lie in the rank's own part, −1 where they are not its own."""
    found = torch.full_like(positions, -1)
    for span in layout.spans(rank):
        inside = (positions >= span.start) & (positions < span.stop)
        found = torch.where(inside, positions - span.start + span.at, found)
    return found


def rule_of_span(rule: Rule, span: Span, queries: Layout, keys: Layout) -> Rule:
    """The rule for one of the rank's ranges of queries, before all keys."""
    parts: dict[str, Any] = {}
    offset = rule.causal_offset
    if isinstance(offset, Tensor):  # of a query's number in the whole sequence
        parts["causal_offset"] = span.start + (offset[:, span.local] if offset.dim() == 2 else offset)
    elif rule.is_causal:
        parts["causal_offset"] = span.start + checks.causal_offset_of(
            True, offset, queries.length, keys.length
        )
    if rule.key_starts is not None and rule.key_starts.dim() == 2:
        parts["key_starts"] = rule.key_starts[:, span.local]
    mask = rule.attn_mask
    if mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1:
        parts["attn_mask"] = mask[..., span.local, :]
    return replace(rule, **parts)
