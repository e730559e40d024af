"""What the commands share: user errors, optional packages, devices and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch


class UsageError(Exception):
    """A bad option or a missing package; the program prints it as one sentence and exits with 2."""


@contextmanager
def refusals(before: str = "") -> Iterator[None]:
    """Within it a ValueError of the library, which knows no options, is the user's: its sentence, after `before`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{before}{error}") from None


def count(least: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return parse


def require(name: str) -> ModuleType:
    """An optional package, imported only where it is needed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # it is there and lacks something itself
        raise UsageError(
            f"this command needs {name.split('.')[0]}, which is not installed: pip install 'sparse-attn[cli]'"
        ) from None


def device_of(name: str) -> torch.device:
    """The device that `--device` names, tried out, because a device may parse and still not be there."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("the meta device computes nothing")
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise UsageError(f"--device {name} is not available here: {reason}") from None
    return device


def available_devices() -> list[str]:
    """The device types that this torch can use on this machine, the CPU first."""
    accelerators = {
        "cuda": torch.cuda.is_available,
        "xpu": torch.xpu.is_available,
        "mps": torch.backends.mps.is_available,
    }
    return ["cpu", *(name for name, there in accelerators.items() if there())]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: for commands that must work without any optional package."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([title, line(columns), line(["─" * width for width in widths]), *map(line, rows)])
