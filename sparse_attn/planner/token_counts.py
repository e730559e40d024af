"""How often each token id occurs in a file of ids, as nanoGPT writes them: `train.bin`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy
import torch
from torch import Tensor

from sparse_attn.checks import boolean, describe, integer

DTYPES = ("uint16", "uint32")
CHUNK = 1 << 25  # ids that are read at one time: a progress bar moves and Ctrl-C works in between
LARGEST_VOCABULARY = 1 << 27


def count_tokens(
    path: str | Path, vocab_size: int | None = None, dtype: str = "uint16", progress: bool = True
) -> Tensor:
    """Counts the ids in a raw binary file (no header, little-endian), without reading it into memory.

    Args:
        path: the file, such as nanoGPT's `train.bin`.
        vocab_size: V, the length of the result; by default the largest id in the file and one more.
        dtype: "uint16" or "uint32", of the file.
        progress: show a bar on standard error while it takes long (where that is a terminal and rich is installed).

    Returns:
        int64 [V] on the CPU. The compiled extension counts on torch's threads; without it numpy does, on one.

    Raises:
        IndexError: an id is `vocab_size` or more; the message names the first and its position.
        ValueError: the file's size is no multiple of an id's, it is empty, or the ids make no sense (a wrong dtype).
        OSError: the file cannot be read.

    Example::

        >>> import numpy, tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     numpy.array([3, 1, 3], dtype="uint16").tofile(file.name)
        ...     count_tokens(file.name)
        tensor([0, 1, 0, 2])
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", getattr(dtype, "name", None))
    if name not in DTYPES:  # numpy.uint16 and numpy.dtype("uint16") have a name too
        raise ValueError(f"dtype must be 'uint16' or 'uint32', got {describe(dtype)}")
    kind = numpy.dtype({"uint16": "<u2", "uint32": "<u4"}[name])
    if vocab_size is not None:
        vocab_size = int(integer("vocab_size", vocab_size, 1, LARGEST_VOCABULARY))
    boolean("progress", progress)
    path = Path(path)
    size = path.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise ValueError(
            f"{path} must hold whole ids of {kind.itemsize} bytes ({kind.name}), at least one, got {size:,} bytes"
        )
    ids = numpy.memmap(path, dtype=kind, mode="r")
    largest, add = _native() or (_largest, _add)
    passes = 1 if vocab_size is not None or kind.itemsize == 2 else 2
    with _bar(f"counting {path.name}", passes * len(ids), progress) as advance:
        known = vocab_size
        if known is None and kind.itemsize == 2:
            known = 1 << 16  # every id fits; the end is cut off below
        if known is None:
            known = 1 + max(largest(chunk) for chunk in _chunks(ids, advance))
            if known > LARGEST_VOCABULARY:
                raise ValueError(
                    f"{path} holds ids up to {known - 1:,}, more than any vocabulary: is it really {kind.name}?"
                )
        counts = numpy.zeros(known, dtype=numpy.int64)
        before = 0
        for chunk in _chunks(ids, advance):
            wrong = add(chunk, counts)
            if wrong >= 0:
                raise IndexError(
                    f"{path}: id {int(chunk[wrong])} at position {before + wrong} is not below "
                    f"vocab_size={vocab_size}"
                )
            before += len(chunk)
    if vocab_size is None:
        counts = counts[: int(counts.nonzero()[0][-1]) + 1].copy()
    return torch.from_numpy(counts)


def _chunks(ids: numpy.ndarray, advance: Callable[[int], None]) -> Iterator[numpy.ndarray]:
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        yield chunk
        advance(len(chunk))


def _native() -> tuple[Callable, Callable] | None:
    """(largest, add) of the extension."""
    if sys.byteorder != "little":
        return None
    extension = import_module("sparse_attn.wings.extension").module
    return extension and (extension.largest_token, extension.count_tokens)


def _largest(ids: numpy.ndarray) -> int:
    return int(ids.max())


def _add(ids: numpy.ndarray, counts: numpy.ndarray) -> int:
    """Adds the occurrences to counts [V]; the position of the first id ≥ V, or -1."""
    if ids.max() >= len(counts):
        return int(numpy.flatnonzero(ids >= len(counts))[0])
    counts += numpy.bincount(ids, minlength=len(counts))
    return -1


@contextmanager
def _bar(name: str, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yields advance(n). The bar is rich's; without rich, or where nobody watches, there is none."""
    if not wanted or not sys.stderr.isatty() or total <= CHUNK:
        yield lambda n: None
        return
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        yield lambda n: None
        return
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda n: bar.advance(task, n)
