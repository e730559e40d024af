"""Counts that keep the structure honest: import circles, how far a word of the rule spreads, what a change touches.

python tools/house.py                    circles and words; exit status 1 where a limit is passed
python tools/house.py --change A..B      also the files that a change touches, the library's apart
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"sparse_attn": "*.py", "triton_kernels": "*.py", "csrc": "*.[hc]*"}
# Shipped beside the library, not part of it: what measures it.
APART = ("sparse_attn/bench/", "sparse_attn/evaluation/")
WORDS = ("sinks", "window", "causal_offset", "key_lengths", "attn_mask")
MOST_FILES = {"sinks": 14}  # the narrowest word of the rule: the others mean other things elsewhere, too


def library_files() -> list[Path]:
    found = (p for folder, pattern in LIBRARY.items() for p in (ROOT / folder).rglob(pattern) if p.is_file())
    return sorted(p for p in found if not is_apart(p.relative_to(ROOT).as_posix()))


def is_apart(path: str) -> bool:
    return path.startswith(APART)


def imports() -> dict[str, set[str]]:
    """Module → the modules of this package that it imports, inside functions too."""
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "sparse_attn").rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    graph[name].add(inner if inner in modules else node.module)
            elif isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
        # That a package's __init__ collects what its modules export, and they import it first, is no circle.
        graph[name] = {m for m in graph[name] if m in modules and m != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--change", metavar="A..B", help="what B's commits change that A does not have")
    arguments = parser.parse_args()
    rings = circles(imports())
    print(f"import circles: {len(rings)}")
    for ring in rings:
        print("  " + ", ".join(ring))
    failed = bool(rings)
    files = library_files()
    for word in WORDS:
        using = [p for p in files if re.search(rf"\b{word}\b", p.read_text())]
        limit = MOST_FILES.get(word)
        print(
            f"library files with the word {word!r}: {len(using)}" + (f" (at most {limit})" if limit else "")
        )
        if limit and len(using) > limit:
            failed = True
            print("\n".join(f"  {p.relative_to(ROOT)}" for p in using))
    if arguments.change:
        # Three dots: since B left A, so that what A has got meanwhile does not count.
        command = ["git", "diff", "--name-only", re.sub(r"\.\.+", "...", arguments.change)]
        touched = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        library = [t for t in touched if t.split("/")[0] in LIBRARY and not is_apart(t)]
        print(f"files touched by {arguments.change}: {len(touched)}, of them in the library {len(library)}")
        print("\n".join(f"  {t}" for t in touched))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
