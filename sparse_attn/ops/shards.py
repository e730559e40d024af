"""How the calls of this package meet more than one process: each function that does work says which axis is which.

    @shardable("query:BHTD key:BHSD value:BHSD rule", "BHTD BHT BGTK")
    def attend_best(query, key, value, top_k, rule, …): …

Letters: B batch, H heads (of queries or keys), T queries, S keys, G heads that select, * any number of axes of which
none is special; other letters stay whole. `rule` stands for the tensors of a Rule. From that sparse_attn.distributed
knows how to call a function on shards: where arguments are DTensors, and inside its context_parallel. A call with
plain tensors outside of it passes by, at the cost of two comparisons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Shardable(NamedTuple):
    """What a function says of itself."""

    name: str
    function: Callable[..., Any]  # as it is on one process
    axes: dict[str, str]  # argument → letters
    results: tuple[str, ...]  # letters of each result

    def outside(self, *arguments: Any, **options: Any) -> Any:
        """The call as it is outside of context_parallel: of DTensors, or of plain tensors."""
        if _any_dtensor((*arguments, *options.values())):
            assert state.on_dtensors is not None  # sparse_attn sets it
            return state.on_dtensors(self, arguments, options)
        return self.function(*arguments, **options)


class Context(Protocol):
    """What a context_parallel makes of calls inside it."""

    @property
    def documents(self) -> bool: ...  # whether it knows of packed ones

    def tokens(self, device: torch.device) -> tuple[int, Tensor]: ...  # of all ranks; which of them are here

    def __call__(self, call: Shardable, positional: tuple, options: dict[str, Any]) -> Any: ...


class _State:
    on_dtensors: Callable[[Shardable, tuple, dict], Any] | None = None
    context: Context | None = None  # of the innermost context_parallel


state = _State()


def is_dtensor(value: object) -> bool:
    return type(value) is not Tensor and hasattr(value, "placements")


def on_one_process(value: object) -> bool:
    """Whether a call with this as its first argument runs here as it is."""
    return state.context is None and not is_dtensor(value)


def _any_dtensor(arguments: tuple) -> bool:
    for value in arguments:  # noqa: SIM110 (a compiler reads it)
        if is_dtensor(value[0] if type(value) is list and value else value):
            return True
    return False


def shardable(axes: str, results: str, look: int = 1) -> Callable[[F], F]:
    """`look`: among so many of the first arguments there is a DTensor where there is any."""
    entries = (entry.partition(":")[::2] for entry in axes.split())
    letters = dict(entries)

    def decorate(function: F) -> F:
        said = Shardable(function.__name__, function, letters, tuple(results.split()))

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if state.context is not None:
                return state.context(said, arguments, options)
            if (look > 1 or not arguments or type(arguments[0]) is not Tensor) and _any_dtensor(
                arguments[:look] or tuple(options.values())
            ):
                assert state.on_dtensors is not None  # sparse_attn sets it
                return state.on_dtensors(said, arguments, options)
            return function(*arguments, **options)

        call.shardable = said  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def refuse_context(what: str) -> None:
    """For what looks at a sequence as a whole and has not learned that it may be a part of one.

    Raises:
        NotImplementedError: inside sparse_attn.distributed.context_parallel.
    """
    if state.context is not None:
        raise NotImplementedError(
            f"{what} does not work inside sparse_attn.distributed.context_parallel, where a rank has a part of the "
            "sequence: call it outside"
        )
