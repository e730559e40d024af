"""A study's results file: rows are kept as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from sparse_attn.bench import machine
from sparse_attn.cli.console import UsageError, count
from sparse_attn.distillation.progress import reporting
from sparse_attn.files import read_json, write_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all studies share."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a smaller form, under three minutes")
    parser.add_argument("--full", action="store_true", help="the full form, the default")
    parser.add_argument(
        "--threads", type=count(1), default=min(2, torch.get_num_threads()), help="torch threads"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and PNG"
    )


def add_training_options(parser: argparse.ArgumentParser, settings) -> None:
    """The options of studies that train models on a text: `asked` takes them into their settings."""
    add_options(parser)
    parser.add_argument("--text", nargs="+", type=Path, help="UTF-8 texts, one document each")
    for name, what in (("steps", "training steps of a run"), ("seeds", "seeds per arm")):
        default = getattr(settings, name)
        parser.add_argument(
            f"--{name}", type=count(1), help=f"{what} (default: {default}; fewer with --quick)"
        )


def asked(arguments: argparse.Namespace, settings):
    """The settings with what the options say instead."""
    names = [name for name in ("steps", "seeds") if getattr(arguments, name) is not None]
    return replace(settings, **{name: getattr(arguments, name) for name in names})


def start(name: str, arguments: argparse.Namespace) -> Results:
    """Opens the results of study `name`; a quick run has a file of its own."""
    if arguments.quick and arguments.full:
        raise UsageError("--quick and --full exclude each other")
    torch.set_num_threads(arguments.threads)
    _shown.clear()
    form = "--quick" if arguments.quick else "--full"
    suffix = "_quick" if arguments.quick else ""
    command = f"sparse-attn study {name} {form} --threads {arguments.threads}"
    texts = getattr(arguments, "text", None)
    if texts:  # folders are left out: they are this machine's
        texts = [texts] if isinstance(texts, str) else texts
        command += f" --text {Path(texts[0]).name}" + f" … ({len(texts)} files)" * (len(texts) > 1)
    return Results(arguments.out / f"study_{name}{suffix}.json", command, arguments.threads)


def _read(file: Path) -> dict:
    try:
        found = read_json(file, "results")
    except ValueError as error:
        raise UsageError(str(error)) from None
    kinds = {"rows": list, "about": dict, "tables": list}
    if not isinstance(found, dict) or any(not isinstance(found.get(n, k()), k) for n, k in kinds.items()):
        raise UsageError(f"{file} holds no results of a study")
    return found


class Results:
    """`rows` of a study, dicts of plain numbers, and what else it found."""

    def __init__(self, file: Path, command: str, threads: int) -> None:
        self.file, self.command, self.threads = file, command, threads
        found = _read(file) if file.exists() else {}
        self.rows: list[dict] = found.get("rows", [])
        self.about: dict = found.get("about", {})
        self.tables: list[dict] = found.get("tables", [])
        self.machine: dict | None = found.get("machine")

    def row(self, **key) -> dict | None:
        """The first row with these values."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def having(self, **key) -> list[dict]:
        """All rows with these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.machine = None  # the date is that of the last row, not of the last look at them
        self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.machine = self.machine or machine.describe(self.threads, self.command)
        result = {"format": 1, "machine": self.machine, "about": self.about, "tables": self.tables}
        # Whole or not at all: a run that is killed leaves a file that the next one goes on from.
        write_text(self.file, json.dumps({**result, "rows": self.rows}, indent=1) + "\n")

    @property
    def picture(self) -> Path:
        return self.file.with_suffix(".png")

    def wrote(self) -> None:
        self.tables = list(_shown)
        self.save()
        print(f"wrote {self.file.name} and {self.picture.name} to {self.file.parent}")


_shown: list[dict] = []  # the tables of the study that runs, for docs/findings.md


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for the eye, kept for the results file; the first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    _shown.append({"title": title, "columns": columns, "rows": rows})


def keep_settings(found: Results, settings: dict) -> None:
    """More seeds may be added to a file; a run with other settings may not."""
    settings = {
        k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()
    }  # as they are read back
    if found.rows and {**found.about["settings"], "seeds": 0} != {**settings, "seeds": 0}:
        raise UsageError(f"{found.file} holds runs with other settings; choose another --out")
    found.about["settings"] = settings


def bar(name: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """A progress bar on standard error: yields `advance(note="")`, for each of `total` steps; `say` writes above it."""
    return reporting(name, total, True)


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)
