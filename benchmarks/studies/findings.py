"""The tables of docs/findings.md, from the results files.

    python -m benchmarks.studies.findings            says whether the page is what the results give
    python -m benchmarks.studies.findings --write    writes it

What stands between `<!-- study NAME: begin -->` and `<!-- study NAME: end -->` is made from
`benchmarks/results/study_NAME.json`, what stands between such lines with `evaluation` from the results of `sparse-attn
evaluate` in `evaluation_NAME.json`; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sparse_attn.bench.machine import in_words
from sparse_attn.evaluation import Store, tables

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE, RESULTS = ROOT / "docs" / "findings.md", ROOT / "benchmarks" / "results"
PART = re.compile(r"<!-- (study|evaluation) (\w+): begin -->\n.*?<!-- \1 \2: end -->", re.DOTALL)


def page() -> str:
    """The page as the results files give it."""
    return PART.sub(lambda part: _part(part[1], part[2]), PAGE.read_text("utf-8"))


def _part(kind: str, name: str) -> str:
    file = RESULTS / f"{kind}_{name}.json"
    result = json.loads(file.read_text("utf-8"))
    if kind == "evaluation":
        result["tables"] = [table._asdict() for table in tables(Store(file, result["about"]))]
    lines = [f"<!-- {kind} {name}: begin -->", ""]
    for table in result["tables"]:
        lines += [f"**{table['title']}**", "", _row(table["columns"])]
        lines += [_row([" --- ", *[" ---: "] * (len(table["columns"]) - 1)]), *map(_row, table["rows"]), ""]
    machine = result["machine"]
    lines += [f"![{name}](../benchmarks/results/{kind}_{name}.png)", ""]
    lines += [f"`{machine['command']}`, {in_words(machine)}.", f"<!-- {kind} {name}: end -->"]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"


def main() -> int:
    made = page()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made, "utf-8")
        return 0
    fits = made == PAGE.read_text("utf-8")
    print("docs/findings.md is what the results give" if fits else "docs/findings.md needs --write")
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
