"""Progress of the long functions: a bar where rich is installed, lines where it is not, or the caller's function."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from sparse_attn import checks

# (what is being done, steps done, steps in all if that is known, a note such as the loss)
Progress = Callable[[str, int, "int | None", str], None]
_SECONDS = 5.0  # between two plain lines


@contextlib.contextmanager
def reporting(
    name: str, total: int | None, progress: Progress | bool | None
) -> Iterator[Callable[..., None]]:
    """Yields `advance(note="")`, to be called after each of `total` steps.

    Args:
        name: what is being done.
        total: steps in all, None if that is not known.
        progress: None or False shows nothing; True a bar (lines without rich) on the standard error, so that the
            standard output stays the program's; a function is called with (name, done, total, note) after each step.

    Raises:
        TypeError: progress is something else.

    Example:
        >>> from sparse_attn.distillation.progress import reporting
        >>> with reporting("count", 2, lambda *step: print(*step)) as advance:
        ...     for i in range(2):
        ...         advance(f"at {i}")
        count 1 2 at 0
        count 2 2 at 1
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be True, False, None or a function, got {checks.describe(progress)}")
    with _display(name, total) if progress is True else contextlib.nullcontext(progress or None) as show:
        done = 0

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            if show is not None:
                show(name, done, total, note)

        yield advance


def length_of(items: Iterable) -> int | None:
    """How many there are, if they can say so before they are gone through."""
    return len(items) if hasattr(items, "__len__") else None


@contextlib.contextmanager
def _display(name: str, total: int | None) -> Iterator[Progress]:
    try:
        from rich import console, progress
    except ModuleNotFoundError:
        yield _lines()
        return
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=console.Console(stderr=True, highlight=False),
    )
    with bar:
        task = bar.add_task(name, total=total, note="")
        yield lambda name, done, total, note: bar.update(task, completed=done, note=note)


def _lines() -> Progress:
    """A line every few seconds, and one at the end."""
    last = time.monotonic()

    def show(name: str, done: int, total: int | None, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _SECONDS:
            last = now
            print(f"{name}: {done}{'' if total is None else f'/{total}'} {note}".rstrip(), file=sys.stderr)

    return show
