"""`sparse-attn plan`: widths of embedding rows from token counts, under a budget of parameters."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy

from sparse_attn.cli.console import UsageError, count, require
from sparse_attn.files import parse_json, read_text
from sparse_attn.planner import WidthPlan, count_tokens, plan_widths
from sparse_attn.planner.choose_widths import RULES

HELP = "choose how wide each token's embedding row is, from token counts, under a budget of parameters"

DESCRIPTION = """\
Gives frequent tokens wide embedding rows and rare ones narrow rows. From how often each token occurs it makes a few
bands of tokens and a width for each, such that the tables and the projections to the model's width together never
have more parameters than the budget, and use at least 97 % of it where that is possible. Prints the plan; --out
writes it as JSON (sparse_attn.WidthPlan.from_json reads it), --plot draws it.
"""

EPILOG = """\
examples:
  sparse-attn plan --tokens train.bin --dim 768 --budget 10M            nanoGPT's file of uint16 ids
  sparse-attn plan --tokens train.bin --dim 768 --ratio 0.25            a quarter of the full table
  sparse-attn plan --counts counts.npy --dim 512 --budget 4M --out plan.json --plot plan.png
  sparse-attn plan --counts counts.txt --dim 512 --ratio 0.5 --bands 3 --rule mass
  sparse-attn plan --tokens ids.bin --dtype uint32 --vocab-size 128256 --dim 2048 --ratio 0.3 --json

files of counts: .npy (one axis), .txt (one number a line, in id order), .json (a list, or an object id -> count).
in Python: plan = sparse_attn.WidthPlan.from_json("plan.json")
"""

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
LARGEST_ID = 1 << 27


def number_of_parameters(text: str) -> int:
    """`10M`, `1.5K`, `250_000`."""
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([KMBG]?)", text.strip(), re.IGNORECASE)
    number = int(float(re.sub("[_,]", "", found[1])) * SUFFIXES[found[2].upper()] + 0.5) if found else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a number of parameters such as 10M or 1.5K, got {text!r}")
    return number


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--counts", metavar="FILE", help="how often each token occurs: .npy, .txt or .json")
    source.add_argument("--tokens", metavar="FILE", help="a raw file of token ids, which are counted")
    add("--dtype", choices=("uint16", "uint32"), default="uint16", help="of --tokens (default uint16)")
    add("--vocab-size", type=count(1), metavar="V", help="rows of the table (default: the largest id + 1)")
    add("--dim", type=count(1), required=True, metavar="D", help="the model's width")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument(
        "--budget", type=number_of_parameters, metavar="N", help="the most parameters: 10M, 1.5K, 250000"
    )
    limit.add_argument(
        "--ratio", type=float, metavar="R", help="the same as a share of the full table, 0 to 1"
    )
    add("--bands", type=count(1), default=4, metavar="N", help="the most bands (default %(default)s)")
    add(
        "--rule",
        choices=RULES,
        default=RULES[0],
        help="where bands end and how wide they are (default lagrange)",
    )
    add(
        "--multiple-of",
        type=count(1),
        default=8,
        metavar="M",
        help="of which widths are multiples (default 8)",
    )
    add("--out", metavar="FILE", help="write the plan as JSON")
    add("--plot", metavar="FILE", help="draw width and counts over the tokens' ranks (.png)")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        require("rich")
    if arguments.plot:
        require("matplotlib.figure")
    for option in ("out", "plot"):  # before counting gigabytes
        name = getattr(arguments, option)
        if name and not Path(name).absolute().parent.is_dir():
            raise UsageError(f"--{option} {name} cannot be written to: there is no such folder")
    counts = _counts(arguments)
    try:
        plan = plan_widths(
            counts,
            arguments.dim,
            budget=arguments.budget,
            ratio=arguments.ratio,
            num_bands=arguments.bands,
            rule=arguments.rule,
            multiple_of=arguments.multiple_of,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    budget = arguments.budget or int(arguments.ratio * plan.num_embeddings * plan.embedding_dim)
    files = {}
    try:
        if arguments.out:
            plan.to_json(arguments.out)
            files["plan"] = arguments.out
        if arguments.plot:
            from sparse_attn.cli.plan_plot import draw

            draw(Path(arguments.plot), plan, counts, _name(arguments))
            files["plot"] = arguments.plot
    except (OSError, ValueError) as error:  # ValueError: matplotlib, of an ending that it does not know
        raise UsageError(f"cannot write a file: {error}") from None
    report = as_dict(plan, counts, budget, arguments.rule, files)
    if arguments.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        print_report(report, _name(arguments))
        if arguments.tokens and arguments.vocab_size is None:
            print("The vocabulary ends with the largest id in the file; --vocab-size sets another.")
    return 0


def as_dict(plan: WidthPlan, counts: numpy.ndarray, budget: int, rule: str, files: dict[str, str]) -> dict:
    """The plan and what it means for these counts, as plain data."""
    total = float(counts.sum())
    mass = numpy.bincount(plan.token_band.numpy(), weights=counts, minlength=plan.num_bands)
    full = plan.num_embeddings * plan.embedding_dim
    return {
        "embedding_dim": plan.embedding_dim,
        "num_embeddings": plan.num_embeddings,
        "rule": rule,
        "budget": budget,
        "num_parameters": plan.num_parameters(),
        "budget_used": plan.num_parameters() / budget,
        "full_table_parameters": full,
        "compression": plan.compression,
        "occurrences": total,
        "tokens_that_never_occur": int((counts == 0).sum()),
        "bands": [
            {
                "tokens": size,
                "share": float(m) / total if total else None,
                "width": width,
                "parameters": numbers,
            }
            for size, m, width, numbers in zip(
                plan.band_sizes, mass, plan.widths, plan.band_parameters(), strict=True
            )
        ],
        "files": files,
    }


def print_report(report: dict, name: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{report['num_embeddings']:,} tokens counted in [bold]{escape(name)}[/], for a model of width "
        f"{report['embedding_dim']}"
    )
    table = Table(title=f'The plan, by the rule "{report["rule"]}"')
    table.title_justify = "left"
    for column in ("band", "tokens", "share of occurrences", "width", "parameters"):
        table.add_column(column, justify="right")
    for number, band in enumerate(report["bands"]):
        share = "–" if band["share"] is None else f"{band['share']:.2%}"
        cells = (f"{band['tokens']:,}", share, f"{band['width']:,}", f"{band['parameters']:,}")
        table.add_row(str(number), *cells, end_section=number == len(report["bands"]) - 1)
    table.add_row("all", f"{report['num_embeddings']:,}", "", "", f"{report['num_parameters']:,}")
    console.print(table)
    console.print(
        f"{report['compression']:.2f}× smaller than the full table of {report['full_table_parameters']:,}; "
        f"{_share(report['budget_used'])} of the budget of {report['budget']:,} used. A band narrower than the model "
        "counts its projection too."
    )
    if report["tokens_that_never_occur"]:
        console.print(
            f"{report['tokens_that_never_occur']:,} tokens never occur in these counts. If your model will meet them, "
            "count more text."
        )
    what = {"plan": "the plan, for WidthPlan.from_json", "plot": "picture"}
    for kind, path in report["files"].items():
        console.print(f"Written: {escape(path)} ({what[kind]})")


def _share(used: float) -> str:
    return f"{math.floor(used * 1000) / 10:.1f} %"  # rounded down: 99.97 is not 100


def _name(arguments: argparse.Namespace) -> str:
    return Path(arguments.counts or arguments.tokens).name


def _counts(arguments: argparse.Namespace) -> numpy.ndarray:
    """How often each token occurs, [V]."""
    try:
        if arguments.tokens:
            return count_tokens(
                arguments.tokens, arguments.vocab_size, arguments.dtype, progress=not arguments.json
            ).numpy()
        counts = read_counts(Path(arguments.counts))
    except OSError as error:
        option = f"--tokens {arguments.tokens}" if arguments.tokens else f"--counts {arguments.counts}"
        raise UsageError(f"{option} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError) as error:
        raise UsageError(str(error)) from None
    wanted = arguments.vocab_size
    if wanted is None:
        return counts
    if len(counts) > wanted:
        raise UsageError(
            f"--counts {arguments.counts} has {len(counts):,} entries, more than --vocab-size {wanted:,}"
        )
    return numpy.concatenate([counts, numpy.zeros(wanted - len(counts), dtype=counts.dtype)])


def read_counts(path: Path) -> numpy.ndarray:
    """Counts in id order from .npy, .txt (one a line) or .json (a list, or an object from id to count)."""
    ending = path.suffix.lower()
    if ending not in (".npy", ".txt", ".json"):
        raise UsageError(f"--counts takes .npy, .txt and .json files, got {path}")
    try:
        if ending == ".npy":
            # Mapped: a header may claim any size, and the file must have it. Never a pickle.
            with numpy.errstate(over="raise"):
                counts = numpy.array(numpy.lib.format.open_memmap(path, mode="r"))
        elif ending == ".txt":
            counts = numpy.array([float(line) for line in read_text(path, "counts").split()])
        else:
            data = parse_json(read_text(path, "counts"))
            if isinstance(data, dict):
                ids = {int(token): count for token, count in data.items()}
                if not ids or min(ids) < 0 or max(ids) > LARGEST_ID:
                    raise ValueError("its keys must be token ids, from 0 on")
                values = numpy.array(list(ids.values()))
                if values.ndim != 1 or values.dtype.kind not in "iuf":
                    raise ValueError("its values must be numbers")
                data = numpy.zeros(max(ids) + 1, dtype=values.dtype)
                data[list(ids)] = values
            counts = numpy.array(data)
    except (ValueError, TypeError, EOFError, ArithmeticError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path} holds no counts: ")
        raise UsageError(f"--counts {path} holds no counts: {reason}") from None
    if counts.ndim != 1 or counts.dtype.kind not in "iuf" or len(counts) == 0:
        raise UsageError(
            f"--counts {path} must hold one number per token, got shape {list(counts.shape)} of {counts.dtype}"
        )
    return counts
