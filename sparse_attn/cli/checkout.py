"""The source tree that this package lies in, if it does: what is not in the wheel is there."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The root of the source tree of this very package, or None.

    The current folder does not count: its benchmarks would be those of another version.
    """
    root = PACKAGE.parent
    project = root / "pyproject.toml"
    if not project.is_file() or not (root / "benchmarks" / "studies" / "__init__.py").is_file():
        return None  # site-packages may hold another project's `benchmarks`
    return root if 'name = "sparse-attn"' in project.read_text("utf-8") else None
