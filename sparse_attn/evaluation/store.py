"""Rows of results in a JSON file, kept as they come: an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_attn.files import read_json, refusal, write_text

Row = dict[str, Any]


class Store:
    """`rows` of plain numbers and texts, and `about`: what they are of.

    Args:
        file: read where it exists, written whole after each row.
        about: what all rows have in common; those of a file that is gone on with must be the same.

    Raises:
        ValueError: the file holds something else, or results of something else.
    """

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file, self.about = file, about
        self.machine: Any = None
        self.rows: list[Row] = []
        if file.exists():
            found = read_json(file, "results")
            if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
                raise refusal(file, "results", "it has no rows")
            if found.get("about") != about:
                raise ValueError(
                    f"{file} has results of {found.get('about')}, and this is {about}: choose another file"
                )
            self.rows, self.machine = found["rows"], found.get("machine")

    def find(self, **key: Any) -> list[Row]:
        """All rows with these values."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        result = {"format": 1, "machine": self.machine, "about": self.about, "rows": self.rows}
        write_text(self.file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
