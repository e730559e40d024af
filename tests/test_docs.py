"""README and docs: links lead somewhere, commands exist, and code and docstring examples run."""

from __future__ import annotations

import doctest
import os
import pkgutil
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
TUTORIALS = sorted(path.stem for path in (DOCS / "tutorials").glob("*.md"))
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn.")
    if not m.name.endswith(("_C", "libsparse_attn", "__main__")) and ".wings." not in m.name
)
# What the package's own text says is in docs/: a page, or a place in it.
NAMED = {
    name: path
    for path in (ROOT / "sparse_attn").rglob("*.py")
    for name in re.findall(r"docs/\w+\.md(?:#[\w-]+)?", path.read_text("utf-8"))
}


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
        if module in ("venv", "pip", "pytest", "build", "twine"):
            continue
        # Some pages say that a command runs with tests on the path.
        file = module.rstrip(".").replace(".", "/")
        places = [base / f"{file}{end}" for base in (ROOT, ROOT / "tests") for end in (".py", "/__main__.py")]
        assert any(p.exists() for p in places) or find_spec(module), f"{page.name}: python -m {module}"


def run_the_code_of(page: str) -> dict:
    """What its blocks leave in their names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
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


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name, monkeypatch):
    """Each asserts itself what it claims."""
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "")  # restored afterwards
        del os.environ[variable]
    run_the_code_of(f"tutorials/{name}.md")


def test_troubleshooting():
    """What it quotes is what the package says, and its code runs."""
    assert run_the_code_of("troubleshooting.md")["out"].shape == (1, 4, 3, 32)
    source = " ".join(path.read_text("utf-8") for path in (ROOT / "sparse_attn").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # strings that go on in the next line
    quotes = re.findall(r"^> (.*)$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert len(quotes) > 5
    for quote in quotes:
        # Without what a call fills in, of which the page shows an example.
        fixed = [
            p
            for p in re.split(r"\d+|'\w+'|\w*_attention\b|on cuda|[:(;].*", quote)
            if p and len(p.strip()) > 8
        ]
        assert fixed, quote
        for part in fixed:
            assert part.strip() in source, f"{quote!r}: nothing says {part.strip()!r}"


@pytest.mark.parametrize("name", NAMED)
def test_pages_that_the_package_names_exist(name):
    page, _, place = name.partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert not place or place in map(anchor, headings), f"{NAMED[name]}: {name}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    torch.manual_seed(0)
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed
