"""What mkdocs does not do by itself (a hook of mkdocs.yml): pages of files outside docs/, and formulas as MathML.

README.md and its neighbours, the examples and the benchmarks' pictures stay where a reader of the repository looks for
them. Here each gets a place on the site, and every link that is right in the repository is made right there.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Path in the repository → on the site; what is under docs/ keeps its own.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL
)


def _places() -> dict[str, str]:
    places = dict(PAGES)
    places["LICENSE"] = "license.md"
    for path in ROOT.glob("examples/*.py"):
        places[f"examples/{path.name}"] = f"examples/{path.stem}.md"
    for path in ROOT.glob("benchmarks/results/*.png"):
        places[f"benchmarks/results/{path.name}"] = f"benchmarks/results/{path.name}"
    return places


PLACES = _places()
SOURCES = {place: source for source, place in PLACES.items()}


def on_files(files, config):
    for source, place in PLACES.items():
        path = ROOT / source
        if path.suffix in (".md", ".png"):
            file = File.generated(config, place, abs_src_path=str(path))
        elif path.suffix == ".py":
            text = path.read_text("utf-8")
            file = File.generated(config, place, content=f"# {path.name}\n\n```python\n{text}```\n")
        else:
            file = File.generated(
                config, place, content=f"# License\n\n```text\n{path.read_text('utf-8')}```\n"
            )
        files.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")
    if not source.endswith(".md"):
        return markdown

    def moved(match: re.Match) -> str:
        opening, target, anchor, closing = match[1], match[2], match[3] or "", match[4]
        if re.match(r"[a-z]+:", target):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PLACES.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else None)
        if there is None:
            return match[0]  # mkdocs says what it does not find
        return opening + posixpath.relpath(there, posixpath.dirname(place) or ".") + anchor + closing

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_page_content(content, page, config, files):
    def to_mathml(match: re.Match) -> str:
        tex = html.unescape(match["tex"])
        try:
            return convert(tex, display="block" if match["tag"] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: formula {tex!r}: {error}") from error

    return FORMULA.sub(to_mathml, content)
