"""README and docs: links lead somewhere, commands exist, and the code of the page on selectors runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparse_attn.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, place = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\bsparse-attn ([a-z]+)\b", text):
        assert name in COMMANDS, f"{page.name}: sparse-attn {name}"
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        if module in ("venv", "pip", "pytest"):
            continue
        # Some pages say that a command runs with tests on the path.
        file = module.rstrip(".").replace(".", "/")
        places = [base / f"{file}{end}" for base in (ROOT, ROOT / "tests") for end in (".py", "/__main__.py")]
        assert any(p.exists() for p in places) or find_spec(module), f"{page.name}: python -m {module}"


def test_the_code_about_selectors_runs():
    text = (ROOT / "docs/choosing_a_selector.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "choosing_a_selector.md", "exec"), names)
    assert names["out"].shape == names["q"].shape
