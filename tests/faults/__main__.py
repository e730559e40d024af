"""Runs the cases; see the package."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from faults import all_cases

DOC = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into docs/faults.md")
    parser.add_argument(
        "names", nargs="*", help="cases such as derivatives.forward_mode; all where none is named"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, wrong = [], 0
    for case in all_cases():
        if options.names and case.name not in options.names:
            continue
        try:
            now = case.run()
        except Exception as error:  # a case may fail in any way; the others still run
            now, wrong = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:300]}", wrong + 1
        print(f"{case.name}\n  {case.what}\n  was: {case.was}\n  now: {now}", flush=True)
        rows.append(f"| {case.what} | {case.was} | {now.replace('|', '∣')} | `{case.name}` |")
    print(f"{len(rows)} cases, {wrong} wrong")
    if options.write and not wrong:
        head, _, rest = DOC.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        table = [
            "| what was done | what it gave | what it gives now | case |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
        DOC.write_text("\n".join([head + BEGIN, "", *table, "", END + tail]))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
