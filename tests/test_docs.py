"""README and docs: links lead somewhere, commands exist, and the code of two pages runs."""

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
    for name in re.findall(r"\bsparse-attn ([a-z]+(?:-[a-z]+)*)\b", text):
        assert name in COMMANDS, f"{page.name}: sparse-attn {name}"
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        if module in ("venv", "pip", "pytest"):
            continue
        # Some pages say that a command runs with tests on the path.
        file = module.rstrip(".").replace(".", "/")
        places = [base / f"{file}{end}" for base in (ROOT, ROOT / "tests") for end in (".py", "/__main__.py")]
        assert any(p.exists() for p in places) or find_spec(module), f"{page.name}: python -m {module}"


def run_the_code_of(page: str) -> dict:
    """What its blocks leave in their names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_the_code_about_selectors_runs():
    names = run_the_code_of("choosing_a_selector.md")
    assert names["out"].shape == names["q"].shape


def test_the_code_about_quality_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    names = run_the_code_of("quality.md")
    assert len(names["store"].find(task="text")) == 12  # three documents: dense, exact, exact/kv, window
    assert (tmp_path / "evaluation.json").exists()


def test_the_code_about_torch_func_runs():
    names = run_the_code_of("torch_func.md")
    assert names["per_sample"][0].shape == names["q"].shape
    assert names["tangent"].shape == names["out"].shape
    assert {g.shape[0] for g in names["gradients"].values()} == {4}
