"""Collectives with gradients over the parts of a sequence, which may differ in length, and a count of what they send.

All of it is torch.distributed's public functions. A rank with nothing takes part like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_attn import checks
from sparse_attn.distributed.layout import Layout

Group = dist.ProcessGroup | None
# Newer names of the same, which the older ones warn of.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass
class Traffic:
    """Bytes that this rank sends to others, by what for: of algorithms that send no more than they must (rings)."""

    sent: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.sent.values())


_counting: list[Traffic] = []


@contextmanager
def count_bytes() -> Iterator[Traffic]:
    """Counts what this package's collectives send from this rank inside the block, forward and backward.

    Example:
        >>> from sparse_attn.distributed import count_bytes
        >>> with count_bytes() as traffic:
        ...     pass
        >>> traffic.total
        0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _sent(what: str, elements: float, tensor: Tensor) -> None:
    for traffic in _counting:
        traffic.sent[what] = traffic.sent.get(what, 0) + int(elements) * tensor.element_size()


def _checked(group: Group) -> Group:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {checks.describe(group)}"
        )
    return group


def size_of(group: Group) -> int:
    return dist.get_world_size(_checked(group))


def rank_in(group: Group) -> int:
    return dist.get_rank(_checked(group))


def all_parts(part: Tensor, lengths: list[int], dim: int, group: Group, what: str) -> list[Tensor]:
    """The parts of all ranks, `lengths` long along `dim`; not differentiated."""
    front = part.movedim(dim, 0).contiguous()
    longest, own = max(lengths), front.shape[0]
    if own < longest:  # one size for all, as all_gather_into_tensor wants it
        front = torch.cat((front, front.new_zeros((longest - own, *front.shape[1:]))))
    every = front.new_empty((len(lengths) * longest, *front.shape[1:]))
    if every.numel():
        _all_gather(every, front, group=group)
        _sent(what, front.numel() * (len(lengths) - 1), front)
    parts = every.unflatten(0, (len(lengths), longest))
    return [parts[r, :n].movedim(0, dim) for r, n in enumerate(lengths)]


def summed_part(parts: list[Tensor], dim: int, group: Group, what: str) -> Tensor:
    """Of each rank's part the sum over all ranks; this rank's own comes back."""
    fronts = [p.movedim(dim, 0) for p in parts]
    longest = max(len(f) for f in fronts)
    every = fronts[0].new_zeros((len(fronts), longest, *fronts[0].shape[1:]))
    for r, f in enumerate(fronts):
        every[r, : len(f)] = f
    own = every.new_empty(every.shape[1:])
    if own.numel():
        _reduce_scatter(own, every.flatten(0, 1), group=group)
        _sent(what, own.numel() * (len(fronts) - 1), own)
    return own[: len(fronts[rank_in(group)])].movedim(0, dim)


class _Gather(torch.autograd.Function):
    """The whole sequence of every rank's part; the gradient of a part is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, layout: Layout, dim: int, group: Group, what: str) -> Tensor:
        ctx.how = layout, dim, group, what
        return layout.whole(all_parts(part, layout.lengths, dim, group, what), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, dim, group, what = ctx.how
        parts = [layout.local(grad, rank, dim) for rank in range(layout.ranks)]
        return summed_part(parts, dim, group, f"{what}, gradient"), None, None, None, None


def gather(part: Tensor, layout: Layout, dim: int, group: Group, what: str) -> Tensor:
    """This rank's part → the whole sequence, in order, on every rank; differentiable."""
    return _Gather.apply(part, layout, dim, group, what)


def exchange(
    rows: Tensor, send: list[int], receive: list[int], group: Group, what: str
) -> Tensor:  # [Σ receive, …]
    """rows [Σ send, …]: the first send[0] go to rank 0, and so on; not differentiated."""
    found = rows.new_empty((sum(receive), *rows.shape[1:]))
    width = max(1, rows[:1].numel() if len(rows) else found[:1].numel())
    if rows.dtype == torch.bool:
        return exchange(rows.view(torch.uint8), send, receive, group, what).view(torch.bool)
    dist.all_to_all_single(found, rows.contiguous(), receive, send, group=group)
    own = rank_in(group)
    _sent(what, (sum(send) - send[own]) * width, rows)
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group, what: str
    ) -> Tensor:
        ctx.how = send, receive, group, what
        return exchange(rows, send, receive, group, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group, what = ctx.how
        return exchange(grad, receive, send, group, f"{what}, gradient"), None, None, None, None


def exchanged(rows: Tensor, send: list[int], receive: list[int], group: Group, what: str) -> Tensor:
    """`exchange`, differentiable."""
    return _Exchange.apply(rows, send, receive, group, what)


class _Sum(torch.autograd.Function):
    """The sum over the ranks, of which each goes on with the same: the gradient of a summand is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, what: str) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        _sent(what, 2 * total.numel() * (size_of(group) - 1) / size_of(group), total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def summed(part: Tensor, group: Group, what: str) -> Tensor:
    """Σ over the ranks; differentiable, where every rank computes the same with it."""
    return _Sum.apply(part, group, what)


class _Copy(torch.autograd.Function):
    """The tensor itself, the same on all ranks, each of which uses it for its own part: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, what: str) -> Tensor:
        ctx.how = group, what
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, what = ctx.how
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        _sent(what, 2 * total.numel() * (size_of(group) - 1) / size_of(group), total)
        return total, None, None


def copied(tensor: Tensor, group: Group, what: str) -> Tensor:
    """`tensor`, which every rank has alike; its gradient is the sum over the ranks."""
    return _Copy.apply(tensor, group, what)


@torch.no_grad()
def largest(tensor: Tensor, group: Group, what: str) -> Tensor:
    """The maximum over the ranks; not differentiated."""
    top = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    _sent(what, 2 * top.numel() * (size_of(group) - 1) / size_of(group), top)
    return top
