"""The docstrings' roles and formulas in Markdown, for the site (a griffe extension that mkdocs.yml names)."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
DISPLAY_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *$))*)", re.MULTILINE)
# "query, key, …," at the end of a line: arguments that are described together, and go on in the next.
CONTINUED = re.compile(r"^((?: {4}){1,3}(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+[,:](?: |$))", re.MULTILINE)
SHAPES = re.compile(
    r"(?<![\w`\[])\[([a-zA-Z_]+(?:, \w+)+)\](?!\()"
)  # else a link where two stand side by side
PAGE = re.compile(r"docs/(\w+)\.md")  # the reference lies in a folder of docs/
# What a docstring may call by its short name, and where the reference has it.
MODULES = ("sparse_attn", "sparse_attn.selection", "sparse_attn.nn", "sparse_attn.planner")


def markdown(text: str, known: dict[str, str]) -> str:
    def display(match: re.Match) -> str:
        indent, body = match[1], textwrap.dedent(match[2]).strip()
        lines = "\n".join(indent + line.strip() for line in body.splitlines() if line.strip())
        return f"{indent}$$\n{lines}\n{indent}$$\n"

    def link(match: re.Match) -> str:
        name = match[1]
        if name in MODULES:
            return f"`{name}`"
        target = known.get(name) or known.get(name.removeprefix("sparse_attn."))
        return f"[`{name}`][{target}]" if target else f"`{name}`"

    while CONTINUED.search(text):
        text = CONTINUED.sub(r"\1 ", text)
    text = "\n".join(
        line if line.lstrip().startswith((">>>", "...")) else SHAPES.sub(r"\\[\1\\]", line)
        for line in text.split("\n")
    )
    text = PAGE.sub(r"[\1](../\1.md)", text)
    text = DISPLAY_MATH.sub(display, text)
    text = INLINE_MATH.sub(r"$\1$", text)
    return ROLE.sub(link, text.replace("Example::\n", "Example:\n"))


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: Any, **kwargs: Any) -> None:
        known: dict[str, str] = {}
        for module_name in MODULES:
            module = pkg if module_name == pkg.path else pkg[module_name.partition(".")[2]]
            for name in module.exports or ():
                short = str(name)
                known.setdefault(short, f"{module_name}.{short}")
                known[f"{module_name.removeprefix('sparse_attn').lstrip('.')}.{short}".lstrip(".")] = (
                    f"{module_name}.{short}"
                )
        self._rewrite(pkg, known, set())

    def _rewrite(self, thing: Any, known: dict[str, str], seen: set[str]) -> None:
        if thing.is_alias or thing.path in seen:
            return
        seen.add(thing.path)
        if thing.docstring:
            thing.docstring.value = markdown(thing.docstring.value, known)
        for member in list(thing.members.values()):
            self._rewrite(member, known, seen)
